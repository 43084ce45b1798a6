"""Checkpoint -> folder for MLX.

source.py reads what is there, plan.py decides what is written, with packing.py and recipes.py for what is packed how;
stream.py writes it, row by row (rows, rounding), target.py places it. calibrate.py measures what the weights are
multiplied with, evaluate.py what the result is worth, sensitivity.py what each group of tensors costs; card.py tells.
"""

if __name__ == "convert":  # an editable install puts this folder on the path too
    raise ModuleNotFoundError("there is no module convert; import mlx_qwen35.convert", name=__name__)

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.dtypes import check_dtype
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.commands.streams import read_file
from mlx_qwen35.convert.apart import Reads
from mlx_qwen35.convert.calibrate import statistics
from mlx_qwen35.convert.card import Facts, write_card
from mlx_qwen35.convert.evaluate import evaluate
from mlx_qwen35.convert.files import find_license
from mlx_qwen35.convert.journal import replaces
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import DEFAULT, find_recipe, is_file
from mlx_qwen35.convert.source import check_readable, reading
from mlx_qwen35.convert.stream import Report, write
from mlx_qwen35.convert.target import appearing_whole, check_space, check_target, prepare, target_path
from mlx_qwen35.errors import InputError
from mlx_qwen35.measure.text import windows

__all__ = ["convert"]


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    *,
    recipe: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    q_vision_bits: int | None = None,
    dtype: str | None = None,
    rounding: str = "search",
    calibration: str | Path | None = None,
    evaluation: str | Path | None = None,
    verify: bool = True,
    resume: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint of the Qwen3.5 family, and return the folder written.

    hf_path: local folder or Hugging Face id; `revision` is a branch, tag or commit of the id. Weights in float32,
    float16, bfloat16 or FP8 with block scales, or packed by an MLX program.
    mlx_path: folder to write. It appears whole or not at all. A folder with content is refused, unless `overwrite`
    is given: then it must hold a checkpoint, which is replaced once the new one is complete.
    recipe: "4bit" (the default), "5bit", "6bit", "8bit", "mxfp4", "nvfp4", "bf16", "fp16" (recipes.py), or a file; or
    quantize: pack all matrices of text model and draft head alike, embedding and head among them: q_mode is "affine"
    (default; 4 bits in groups of 64 unless q_bits and q_group_size say otherwise), "mxfp4", "mxfp8" or "nvfp4" (whose
    bits and group size are fixed). With either the vision tower's matrices are packed too, whatever the text's mode and
    bits: affine in q_vision_bits (2, 3, 4, 5, 6 or 8; default 8; 0 leaves the tower unquantized), in groups of 64 where
    that divides their width, else of 32; a matrix that neither divides stays unquantized. So do the tower's patch and
    position embeddings, norms, convolutions and biases. A source that an MLX program has packed stays as it is packed
    unless one of the two is given.
    dtype: "float16", "bfloat16" or "float32" for what is not packed; by default the one that config.json names. A_log
    stays float32, and other float32 vectors of the text model are kept exactly beside their rounded form.
    rounding: "search" finds ranges, scales and biases of each group with less error than "nearest", mx.quantize's.
    calibration: a text file; the error is then weighted by what each column is multiplied with on it.
    evaluation: a text file on which the result is compared with the source: perplexity, KL divergence, top-1.
    verify: measure the error of every tensor, and read again what was written. resume: go on where a killed conversion
    to mlx_path stopped.

    The folder keeps Hugging Face's names and layout: mlx-lm and mlx-vlm load it, and transformers too unless it is
    quantized. The same source and options give the same bytes. README.md and quality.json tell what was done and
    measured. Raises InputError when a rule is broken, before anything is written wherever the headers show it.
    """
    target = target_path(mlx_path)
    if replaces(target) is None:  # else an earlier conversion must be brought to its end first
        check_target(target, overwrite)
    options: dict[str, Any] = {
        "recipe": recipe, "quantize": quantize, "bits": q_bits, "group_size": q_group_size, "mode": q_mode,
        "vision_bits": q_vision_bits, "dtype": None if dtype is None else check_dtype("--dtype", dtype),
        "rounding": rounding,
    }  # fmt: skip
    source = resolve(hf_path, revision, lambda headers: _judge(headers, target, options))
    named = [calibration, evaluation, *([recipe] if is_file(recipe) else [])]
    reads = Reads(source, tuple(Path(os.path.expanduser(file)) for file in named if file is not None))
    prepare(target, overwrite, reads)
    with reading(source):
        options = with_default(source, options)
        plan = make_plan(source, **options)
        check_readable(plan.sources)
        license = find_license(source)
    if calibration is not None:
        if rounding != "search" or not any(job.quantization for job in plan.jobs):
            raise InputError(
                "option_no_effect",
                "--calibration weighs the errors of a search: it has no effect where nothing is packed, or with "
                "--rounding nearest. Leave it out",
            )
        checkpoint = open_checkpoint(source)
        importance = statistics(checkpoint, windows(checkpoint, read_file("--calibration", Path(calibration))))
        plan = make_plan(source, **options, statistics=importance)
    tokens = None if evaluation is None else windows(open_checkpoint(source), read_file("--eval", Path(evaluation)))
    with appearing_whole(target, overwrite, resume, reads) as folder:
        check_space(plan.nbytes, target)
        report = write(plan, folder, verify=verify)
        facts = _facts(target, hf_path, options, report, license)
        if tokens is not None:
            found = evaluate(open_checkpoint(source), open_checkpoint(folder), tokens)
            facts = {**facts, "evaluation": found, "text": Path(evaluation).name}
        write_card(folder, Facts(**facts))
    return target


def with_default(source: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of make_plan, with the default recipe where they say nothing of how to pack and the source is not packed.

    "Packed" means by an MLX program, and the trunk. FP8 is not: its weights are made whole and packed by the recipe.
    """
    if options["quantize"] or any(options[name] is not None for name in ("recipe", "bits", "group_size", "mode")):
        return dict(options)
    checkpoint = open_checkpoint(source, fp8=True)
    packed = any(checkpoint.quantization(name) for name in checkpoint.entries if not name.startswith(MTP))
    return {**options, "recipe": None if packed else DEFAULT}


def _judge(headers: Path, target: Path, options: Mapping[str, Any]) -> None:
    """InputError where the headers show that a conversion could not be written."""
    with warnings.catch_warnings(action="ignore"):  # they come with the plan that is carried out
        check_space(make_plan(headers, **with_default(headers, options)).nbytes, target)


def _facts(
    target: Path, named: str | Path, options: Mapping[str, Any], report: Report, license: str | None
) -> dict[str, Any]:
    recipe = options["recipe"]
    given = [f"{name.replace('_', ' ')} {options[name]}" for name in ("bits", "group_size", "mode") if options[name]]
    by_hand = ", ".join(["packed alike by hand", *given]) if options["quantize"] else "as in the source"
    return {
        "name": target.name,
        "source": str(named).encode(errors="replace").decode(),
        "recipe": Path(recipe).name if recipe else by_hand,
        "reasons": find_recipe(recipe).reasons if recipe else (),
        "rounding": options["rounding"],
        "errors": report.errors,
        "license": license,
    }
