"""Checkpoint -> folder for MLX.

source.py reads what is there, plan.py decides what is written, with packing.py and recipes.py for what is packed how;
stream.py writes it, row by row (rows, rounding), target.py places it. calibrate.py measures what the weights are
multiplied with, evaluate.py what the result is worth, sensitivity.py what each group of tensors costs; card.py tells.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint import open_checkpoint
from mlx_qwen35.convert.calibrate import statistics
from mlx_qwen35.convert.card import Facts, write_card
from mlx_qwen35.convert.evaluate import evaluate, windows
from mlx_qwen35.convert.files import find_license
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import find_recipe
from mlx_qwen35.convert.stream import Report, write
from mlx_qwen35.convert.target import appearing_whole, check_apart, check_space, check_target
from mlx_qwen35.errors import InputError
from mlx_qwen35.hub import resolve

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
    recipe: "4bit" (the usual one), "5bit", "6bit", "8bit", "mxfp4", "nvfp4", "bf16", "fp16" (recipes.py), or a file; or
    quantize: pack all matrices of text model and draft head alike, embedding and head among them: q_mode is "affine"
    (default; 4 bits in groups of 64 unless q_bits and q_group_size say otherwise), "mxfp4", "mxfp8" or "nvfp4" (whose
    bits and group size are fixed). With either the vision tower's matrices are packed too, whatever the text's mode and
    bits: affine in q_vision_bits (2, 3, 4, 5, 6 or 8; default 8; 0 leaves the tower unquantized), in groups of 64 where
    that divides their width, else of 32; a matrix that neither divides stays unquantized. So do the tower's patch and
    position embeddings, norms, convolutions and biases. With neither, what is packed stays so.
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
    target = Path(mlx_path).expanduser().resolve()
    check_target(target, overwrite)
    source = resolve(hf_path, revision)
    check_apart(source, target)
    options: dict[str, Any] = {
        "recipe": recipe, "quantize": quantize, "bits": q_bits, "group_size": q_group_size, "mode": q_mode,
        "vision_bits": q_vision_bits, "dtype": dtype, "rounding": rounding,
    }  # fmt: skip
    plan = make_plan(source, **options)
    if calibration is not None:
        if rounding != "search" or not any(job.quantization for job in plan.jobs):
            raise InputError(
                "option_no_effect",
                "--calibration weighs the errors of a search: it has no effect where nothing is packed, or with "
                "--rounding nearest. Leave it out",
            )
        checkpoint = open_checkpoint(source)
        importance = statistics(checkpoint, windows(checkpoint, read_text(calibration)))
        plan = make_plan(source, **options, statistics=importance)
    tokens = None if evaluation is None else windows(open_checkpoint(source), read_text(evaluation))
    with appearing_whole(target, overwrite, resume) as folder:
        check_space(plan.nbytes, target)
        report = write(plan, folder, verify=verify)
        facts = _facts(target, hf_path, source, options, report)
        if tokens is not None:
            found = evaluate(open_checkpoint(source), open_checkpoint(folder), tokens)
            facts = {**facts, "evaluation": found, "text": Path(evaluation).name}
        write_card(folder, Facts(**facts))
    return target


def read_text(file: str | Path) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("text_unreadable", f"a text must be a readable UTF-8 file: {error}") from error


def _facts(target: Path, named: str | Path, source: Path, options: Mapping[str, Any], report: Report) -> dict[str, Any]:
    recipe = options["recipe"]
    given = [f"{name.replace('_', ' ')} {options[name]}" for name in ("bits", "group_size", "mode") if options[name]]
    by_hand = ", ".join(["packed alike by hand", *given]) if options["quantize"] else "as in the source"
    return {
        "name": target.name,
        "source": str(named),
        "recipe": Path(recipe).name if recipe else by_hand,
        "reasons": find_recipe(recipe).reasons if recipe else (),
        "rounding": options["rounding"],
        "errors": report.errors,
        "license": find_license(source),
    }
