"""The command mlx_qwen35.convert: --hf-path FOLDER_OR_ID --mlx-path OUT --recipe 4bit"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.hub import check_repository, look, resolve, upload
from mlx_qwen35.checkpoint.names import VISION
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.commands.common import Parser, add_version, as_command
from mlx_qwen35.commands.streams import read_file
from mlx_qwen35.convert import convert, with_default
from mlx_qwen35.convert.card import QUALITY
from mlx_qwen35.convert.dry_run import describe
from mlx_qwen35.convert.plan import DTYPES, ROUNDINGS, make_plan
from mlx_qwen35.convert.recipes import DEFAULT, RECIPES, StorageOptions, check_saving, save_recipe
from mlx_qwen35.convert.sensitivity import CANDIDATES, propose, sensitivity, smallest, table, unmeasured
from mlx_qwen35.convert.source import reading
from mlx_qwen35.errors import InputError
from mlx_qwen35.measure.text import windows
from mlx_qwen35.quantization import MODES

COMMAND = "mlx_qwen35.convert"
def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=COMMAND,
        description="Convert a checkpoint of the Qwen3.5 family to a folder that mlx_qwen35, mlx-lm and mlx-vlm load. "
        "Works in chunks: half a GB of memory is enough for any size.",
    )
    add_version(parser)
    parser.add_argument("--hf-path", required=True, help="local folder or Hugging Face id of the source")
    parser.add_argument("--mlx-path", help="folder to write; appears whole or not at all")
    parser.add_argument("--revision", help="branch, tag or commit of the Hugging Face id")
    group = parser.add_argument_group("how it is stored")
    uses = "; ".join(f"{name}: {recipe.use}" for name, recipe in RECIPES.items())
    group.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"{uses}; or a file that --save-recipe has written (default: {DEFAULT}, but a source that an MLX program "
        "has packed stays as it is packed)",
    )
    group.add_argument("-q", "--quantize", action="store_true", help="pack everything alike, by hand, not by a recipe")
    group.add_argument("--q-bits", type=int, help="bits per weight (affine: 2, 3, 4, 5, 6 or 8; default 4)")
    group.add_argument("--q-group-size", type=int, help="weights per scale (affine: 32, 64 or 128; default 64)")
    group.add_argument("--q-mode", choices=tuple(MODES), help="default affine")
    group.add_argument(
        "--q-vision-bits",
        type=int,
        help="bits per weight of the vision encoder, always affine (2, 3, 4, 5, 6 or 8; default 8; 0: unquantized); a "
        "matrix whose width is no multiple of 32 stays unquantized",
    )
    group.add_argument("--dtype", choices=tuple(DTYPES), help="of what is not quantized; default: the source's")
    group.add_argument("--rounding", choices=ROUNDINGS, default="search", help="how packed groups are rounded")
    group.add_argument("--calibration", metavar="TEXT", help="weigh the errors by what is computed on this text file")
    group = parser.add_argument_group("writing and checking")
    group.add_argument("--overwrite", action="store_true", help="replace the checkpoint at --mlx-path when done")
    group.add_argument("--resume", action="store_true", help="go on where a killed conversion to --mlx-path stopped")
    group.add_argument("--no-verify", dest="verify", action="store_false", help="measure no errors, read nothing again")
    group.add_argument(
        "--eval", dest="evaluation", metavar="TEXT",
        help="compare with the source on this text file: perplexity, KL divergence, top-1 agreement",
    )  # fmt: skip
    group.add_argument("--upload-repo", metavar="ID", help="publish the folder on Hugging Face under this id")
    group = parser.add_argument_group("only look")
    group.add_argument("--dry-run", action="store_true", help="print what would be written, from the headers alone")
    group.add_argument("--sensitivity", metavar="TEXT", help="measure on this text what packing a group costs")
    group.add_argument("--cap", type=float, metavar="GB", help="with --sensitivity: propose a recipe of at most this")
    group.add_argument("--save-recipe", type=Path, metavar="FILE", help="write the proposed recipe, for --recipe FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    with as_command(COMMAND):
        options = vars(_parser().parse_args(arguments))
        look = {name: options.pop(name) for name in ("dry_run", "sensitivity", "cap", "save_recipe")}
        if look["cap"] is not None and not look["sensitivity"]:
            raise InputError("option_no_effect", "--cap has no effect without --sensitivity; add it or leave it out")
        if look["cap"] is not None and not 0 < look["cap"] < math.inf:
            raise InputError("option_invalid", f"--cap must be a number of GB above 0, got {look['cap']}")
        if look["save_recipe"] and look["cap"] is None:
            raise InputError(
                "option_no_effect",
                "--save-recipe has no effect without --sensitivity and --cap; add them or leave it out",
            )
        if look["dry_run"] or look["sensitivity"]:
            _look(options, **look)
            return
        if not options["mlx_path"]:
            raise InputError("option_missing", "--mlx-path must be given: the folder to write")
        repository = options.pop("upload_repo")
        if repository:
            check_repository(repository)
        folder = convert(options.pop("hf_path"), options.pop("mlx_path"), **options)
        print(_summary(folder, time.perf_counter() - start))
        if repository:
            print(f"published: {upload(folder, repository)}")


def _look(
    options: dict[str, Any], dry_run: bool, sensitivity: str | None, cap: float | None, save_recipe: Path | None
) -> None:
    """Print what --dry-run or --sensitivity finds."""
    if dry_run and sensitivity:
        raise InputError("option_conflict", "--dry-run reads headers alone and --sensitivity all weights. Choose one")
    writing = ("mlx_path", "calibration", "evaluation", "overwrite", "resume", "upload_repo")
    idle = [name for name in writing if options[name]] + ([] if options["verify"] else ["no_verify"])
    if idle:
        names = ", ".join("--" + {"evaluation": "eval"}.get(name, name).replace("_", "-") for name in idle)
        raise InputError(
            "option_no_effect",
            f"{names} has no effect where nothing is written (--dry-run, --sensitivity); leave it out",
        )
    named = options["hf_path"], options["revision"]
    storage = StorageOptions(**{field.name: options[field.name] for field in fields(StorageOptions)})
    if dry_run:
        with look(*named) as source, reading(source):
            listing = describe(make_plan(source, with_default(source, storage)))  # while the folder is there
        print(listing)
        return
    assert sensitivity is not None
    given = [field.name for field in fields(storage) if options[field.name] != field.default]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            "option_conflict", f"{names} must not be given with --sensitivity, which tries its own. Leave it out"
        )
    source = resolve(*named)
    if save_recipe:
        check_saving(save_recipe, (Path(sensitivity).expanduser(), *source.iterdir()))
    with reading(source):
        checkpoint = open_checkpoint(source)
    _sensitivity(checkpoint, read_file("--sensitivity", Path(sensitivity)), cap, save_recipe)


def _sensitivity(checkpoint: Checkpoint, text: str, cap: float | None, file: Path | None) -> None:
    """Print the table; under a cap, tensors in no group (norms, vision encoder, draft head) count as by default.

    A cap that nothing fits under is refused before anything is measured, and what was measured is printed first.
    """
    tokens, limit, other = windows(checkpoint, text), 0, 0
    if cap is not None:
        planned = unmeasured(checkpoint)
        grouped = {name for cost in planned for name in cost.names}
        jobs = make_plan(checkpoint.folder, StorageOptions(DEFAULT)).jobs
        limit, other = int(cap * 1e9), sum(job.nbytes for job in jobs if job.source.name not in grouped)
        smallest(planned, limit, other)
    costs = sensitivity(checkpoint, tokens)
    proposal = None if cap is None else propose(costs, limit, other)
    print(table(costs, proposal), flush=True)
    if proposal and file:
        save_recipe(file, proposal.matrices, CANDIDATES[0], f"proposed for at most {cap:g} GB by the KL of each group")


def _size(nbytes: int, shapes: Iterable[tuple[int, ...]]) -> str:
    bits = 8 * nbytes / sum(math.prod(shape) for shape in shapes)
    return f"{nbytes / 1e9:.3f} GB, {bits:.3f} bits per weight"


def _vision_line(checkpoint: Checkpoint) -> str:
    """The vision encoder's size, and in a quantized folder the number of its unquantized matrices; "" without one."""
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(VISION)}
    if not shapes:
        return ""
    matrices = [name for name, shape in shapes.items() if is_matrix(name, shape)]
    left = sum(checkpoint.quantization(name) is None for name in matrices) if checkpoint.config.quantization else 0
    note = f", {left} of its {len(matrices)} matrices unquantized" if left else ""
    return f"vision encoder: {_size(checkpoint.nbytes((VISION,)), shapes.values())}{note}\n"


def _evaluation_line(folder: Path) -> str:
    found = json.loads((folder / QUALITY).read_text(encoding="utf-8")).get("evaluation")
    if not found:
        return ""
    return (
        f"against the source on {found['positions']} tokens: KL divergence {found['kl']:.5f}, same most likely token "
        f"{found['top1']:.2%}, perplexity {found['perplexity']:.4f} (source {found['source_perplexity']:.4f})\n"
    )


def _summary(folder: Path, seconds: float) -> str:
    checkpoint = open_checkpoint(folder)
    tensors = [*checkpoint.entries.values(), *checkpoint.fp32_original.values()]
    files = {entry.file for entry in tensors}
    return (
        f"wrote {folder}: {len(tensors)} tensors in {len(files)} file{'s' if len(files) > 1 else ''}, "
        f"{sum(entry.nbytes for entry in tensors) / 1e9:.3f} GB\n"
        f"text model: {_size(checkpoint.nbytes(), text_shapes(checkpoint.config.text).values())}\n"
        f"{_vision_line(checkpoint)}{_evaluation_line(folder)}"
        f"time: {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
