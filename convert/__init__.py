"""Checkpoint -> folder for MLX.

source.py reads the source, recipes.py chooses quantizations, plan.py plans the tensors to write and files.py the files
beside them; stream.py writes, chunk by chunk (rows, rounding, float16, verify), target.py places the folder and
journal.py makes it resumable. calibrate.py measures activations, evaluate.py the result, sensitivity.py the cost of
each group of tensors; card.py writes the model card.
"""

if __name__ == "convert":  # an editable install puts this folder on the path too
    raise ModuleNotFoundError("there is no module convert; import mlx_qwen35.convert", name=__name__)

import os
import warnings
from dataclasses import replace
from pathlib import Path

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.console.streams import read_file
from mlx_qwen35.convert.apart import Reads
from mlx_qwen35.convert.calibrate import statistics
from mlx_qwen35.convert.card import Facts, write_card
from mlx_qwen35.convert.evaluate import evaluate
from mlx_qwen35.convert.files import find_license
from mlx_qwen35.convert.journal import replaces
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import DEFAULT, NO_OPTIONS, StorageOptions, find_recipe, names_file
from mlx_qwen35.convert.source import check_readable, reading
from mlx_qwen35.convert.stream import write
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
    rope_scaling: str | None = None,
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
    float16, bfloat16 or FP8 with block scales, or quantized by an MLX program.
    mlx_path: folder to write. It appears whole or not at all. A folder with content is refused, unless `overwrite`
    is given: then it must hold a checkpoint, which is replaced once the new one is complete.
    recipe: "4bit" (the default), "5bit", "6bit", "8bit", "mxfp4", "nvfp4", "bf16", "fp16" (recipes.py), or a file; or
    quantize: all matrices of text model and draft head alike, embedding and lm_head among them. q_mode is "affine"
    (default; 4 bits in groups of 64 unless q_bits and q_group_size say otherwise), "mxfp4", "mxfp8" or "nvfp4", whose
    bits and group size are fixed. Both quantize the vision encoder's matrices too: affine in q_vision_bits (2, 3, 4, 5,
    6 or 8; default 8; 0 leaves the encoder unquantized), in groups of 64 where that divides their width, else of 32; a
    matrix that neither divides stays unquantized. So do the encoder's patch and position embeddings, norms,
    convolutions and biases. Without either, a source that an MLX program has quantized stays as it is.
    dtype: "float16", "bfloat16" or "float32" of unquantized tensors; by default the one that config.json names. A_log
    stays float32, and other float32 vectors of the text model are stored twice, rounded and as they are.
    rope_scaling: "yarn", "yarn:FACTOR" or "none" in place of the source's, see docs/long_context.md.
    rounding: "search" finds ranges, scales and biases of each group with less error than "nearest", mx.quantize's.
    calibration: a text file; the error is then weighted by the inputs of each column on it.
    evaluation: a text file on which the result is compared with the source: perplexity, KL divergence, top-1.
    verify: measure the error of every tensor, and read again what was written. resume: continue a killed conversion to
    mlx_path.

    The folder keeps Hugging Face's names and layout: mlx-lm and mlx-vlm load it, and transformers too unless it is
    quantized. The same source and options give the same bytes. README.md and quality.json hold what was measured.
    Raises InputError when a rule is broken, before anything is written wherever the headers show it.
    """
    target = target_path(mlx_path)
    if replaces(target) is None:  # else an earlier conversion must be brought to its end first
        check_target(target, overwrite)
    storage = recipe, quantize, q_bits, q_group_size, q_mode, q_vision_bits, dtype, rope_scaling, rounding
    options = StorageOptions(*storage)
    source = resolve(hf_path, revision, lambda headers: _judge(headers, target, options))
    named = [calibration, evaluation, recipe if names_file(recipe) else None]
    reads = Reads(source, tuple(Path(os.path.expanduser(file)) for file in named if file is not None))
    prepare(target, overwrite, reads)
    with reading(source):
        options = with_default(source, options)
        plan = make_plan(source, options)
        check_readable(plan.sources)
        license = find_license(source)
    if calibration is not None:
        if rounding != "search" or not any(job.quantization for job in plan.jobs):
            raise InputError(
                "option_no_effect",
                "--calibration weighs the errors of a search: it has no effect where nothing is quantized, or with "
                "--rounding nearest. Leave it out",
            )
        checkpoint = open_checkpoint(source, rope_scaling=options.rope_scaling)
        tokens = windows(checkpoint, read_file("--calibration", Path(calibration)))
        plan = replace(plan, statistics=statistics(checkpoint, tokens))
    if evaluation is not None:
        original = open_checkpoint(source, rope_scaling=options.rope_scaling)
        text = windows(original, read_file("--eval", Path(evaluation)))
    with appearing_whole(target, overwrite, resume, reads) as folder:
        check_space(plan.nbytes, target)
        report = write(plan, folder, verify=verify)
        facts = Facts(
            name=target.name,
            source=str(hf_path).encode(errors="replace").decode(),
            recipe=_recipe_name(options),
            reasons=find_recipe(options.recipe).reasons if options.recipe else (),
            rounding=rounding,
            errors=report.errors,
            license=license,
        )
        if evaluation is not None:
            found = evaluate(original, open_checkpoint(folder), text)
            facts = replace(facts, evaluation=found, text=Path(evaluation).name)
        write_card(folder, facts)
    return target


def with_default(source: Path, options: StorageOptions) -> StorageOptions:
    """The options with the default recipe, where they choose no quantization and the source is not quantized.

    A text model in FP8, or a quantized draft head alone, makes no quantized source.
    """
    if replace(options, q_vision_bits=None, dtype=None, rope_scaling=None, rounding=NO_OPTIONS.rounding) != NO_OPTIONS:
        return options
    checkpoint = open_checkpoint(source, fp8=True, rope_scaling=options.rope_scaling)
    quantized = any(checkpoint.quantization(name) for name in checkpoint.entries if not name.startswith(MTP))
    return options if quantized else replace(options, recipe=DEFAULT)


def _judge(headers: Path, target: Path, options: StorageOptions) -> None:
    """InputError where the headers show that a conversion could not be written."""
    with warnings.catch_warnings(action="ignore"):  # they come with the plan that is carried out
        check_space(make_plan(headers, with_default(headers, options)).nbytes, target)


def _recipe_name(options: StorageOptions) -> str:
    """The recipe in the card's words."""
    if options.recipe:
        return Path(options.recipe).name
    if not options.quantize:
        return "as in the source"
    given = {"bits": options.q_bits, "group size": options.q_group_size, "mode": options.q_mode}
    return ", ".join(["quantized alike by hand", *(f"{name} {value}" for name, value in given.items() if value)])
