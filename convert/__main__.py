"""The command mlx_qwen35.convert: --hf-path FOLDER_OR_ID --mlx-path OUT --recipe 4bit"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.fusing import with_own_head
from mlx_qwen35.checkpoint.hub import check_repository, look, resolve, upload
from mlx_qwen35.checkpoint.names import VISION
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.console.json_output import STDOUT, add_json, check_json, write_json
from mlx_qwen35.console.options import add_options, given_options
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.plot import check_plot
from mlx_qwen35.console.run import as_command
from mlx_qwen35.console.streams import read_file
from mlx_qwen35.convert import convert, sensitivity_plot
from mlx_qwen35.convert.card import QUALITY
from mlx_qwen35.convert.conversion import with_default
from mlx_qwen35.convert.dry_run import describe, planned_tensors
from mlx_qwen35.convert.fusion import AdapterOptions, described
from mlx_qwen35.convert.options import CommandOptions, FolderOptions, WritingOptions
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import DEFAULT, StorageOptions, check_saving, save_recipe
from mlx_qwen35.convert.sensitivity import (
    CANDIDATES,
    GroupCost,
    measured,
    propose,
    sensitivity,
    smallest,
    table,
    unmeasured,
)
from mlx_qwen35.convert.source import reading
from mlx_qwen35.errors import InputError
from mlx_qwen35.measure.text import windows
from mlx_qwen35.options import listed, options_of

COMMAND = "mlx_qwen35.convert"


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s --hf-path MODEL --mlx-path FOLDER [options]",
        description="Convert a checkpoint of the Qwen3.5 family to a folder that mlx_qwen35, mlx-lm and mlx-vlm load. "
        "Works in chunks: a quarter of a GB of memory is enough for any size.",
        examples=(
            "--hf-path Qwen/Qwen3.5-4B --mlx-path Qwen3.5-4B-4bit",
            "--hf-path Qwen/Qwen3.5-4B --dry-run --recipe 8bit",
            "--hf-path Qwen/Qwen3.5-4B --adapter my-adapter --mlx-path my-4B-4bit",
            "--hf-path nano --mlx-path nano-8bit --recipe 8bit",
        ),
    )
    own = options_of(CommandOptions)
    add_options(parser, options_of(FolderOptions).values())
    add_options(parser.add_argument_group("storage"), options_of(StorageOptions).values())
    add_options(parser.add_argument_group("adapter"), options_of(AdapterOptions).values())
    group = parser.add_argument_group("writing and checking")
    add_options(group, [*options_of(WritingOptions).values(), own["upload_repo"]])
    group = parser.add_argument_group("measurements, which write no weights")
    add_options(group, [option for name, option in own.items() if name != "upload_repo"])
    add_json(parser, "what was written, or would be, or was measured,")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    with as_command(COMMAND):
        args = parser().parse(arguments)
        check_json(args.json)
        options = given_options(args, (FolderOptions, StorageOptions, AdapterOptions, WritingOptions))
        _check_effects(args)
        if args.dry_run or args.sensitivity:
            _look(args, options)
            return
        if not args.mlx_path:
            raise InputError("option_missing", "--mlx-path must be given: the folder to write")
        if args.upload_repo:
            check_repository(args.upload_repo)
        folder = convert(**options)
        found = _written(folder, time.perf_counter() - start)
        if args.json != STDOUT:
            print(_summary(found), flush=True)
        if args.upload_repo:
            found["published"] = upload(folder, args.upload_repo)
            if args.json != STDOUT:
                print(f"published: {found['published']}")
        write_json(args.json, found)


def _check_effects(args: argparse.Namespace) -> None:
    """InputError where the source is missing, or an option has no effect beside the others."""
    if not args.hf_path:
        raise InputError("option_missing", "--hf-path must be given: a local folder or a Hugging Face id")
    if args.cap is not None and not args.sensitivity:
        raise InputError("option_no_effect", "--cap has no effect without --sensitivity; add it or leave it out")
    if args.save_recipe and args.cap is None:
        raise InputError(
            "option_no_effect",
            "--save-recipe has no effect without --sensitivity and --cap; add them or leave it out",
        )
    if args.plot and not args.sensitivity:
        raise InputError("option_no_effect", "--plot has no effect without --sensitivity; add it or leave it out")


def _look(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Print what --dry-run or --sensitivity finds. options: of `convert`, as far as they were given."""
    if args.dry_run and args.sensitivity:
        raise InputError("option_conflict", "--dry-run reads headers alone and --sensitivity all weights. Choose one")
    writing = {"mlx_path", "calibration", *options_of(WritingOptions)}
    idle = [name for name in options if name in writing] + ["upload_repo"] * bool(args.upload_repo)
    if idle:
        raise InputError(
            "option_no_effect",
            f"{listed(idle)} has no effect where nothing is written (--dry-run, --sensitivity); leave it out",
        )
    given = {name: options[name] for name in options_of(StorageOptions) if name in options}
    adapter = AdapterOptions(**{name: options[name] for name in options_of(AdapterOptions) if name in options})
    if args.dry_run:
        with look(args.hf_path, args.revision) as source, reading(source):
            # while the folder is there
            plan = make_plan(source, with_default(source, StorageOptions(**given)), adapter)
            found, listing = planned_tensors(plan), describe(plan)
        if not write_json(args.json, found):
            print(listing)
        return
    stored = options_of(StorageOptions)
    if others := [name for name, value in given.items() if value != stored[name].default]:
        raise InputError(
            "option_conflict",
            f"{listed(others)} must not be given with --sensitivity, which reads the source as it is and tries its "
            "own storage. Leave it out",
        )
    source = resolve(args.hf_path, args.revision)
    if args.plot:
        check_plot(args.plot)
    if args.save_recipe:
        folders = [folder for folder in (source, *adapter.folders) if folder.is_dir()]
        read = [file for folder in folders for file in folder.iterdir()]
        check_saving(args.save_recipe, (args.sensitivity.expanduser(), *read))
    with reading(source):
        checkpoint = open_checkpoint(source)
    costs = _sensitivity(checkpoint, adapter, read_file("--sensitivity", args.sensitivity), args)
    if args.plot:
        name = " with ".join(Path(given).name for given in (args.hf_path, *adapter.folders))
        sensitivity_plot.draw(args.plot, name, f"{name}, on {args.sensitivity.name}", costs)


def _sensitivity(
    checkpoint: Checkpoint, adapter: AdapterOptions, text: str, args: argparse.Namespace
) -> Sequence[GroupCost]:
    """Print the table; under a cap, tensors in no group (norms, vision encoder, draft head) count as by default.

    A cap that nothing fits under is refused before anything is measured, and what was measured is printed first.
    """
    tokens, limit, other, cap = windows(checkpoint, text), 0, 0, args.cap
    fused = adapter.read(checkpoint)
    checkpoint = with_own_head(checkpoint, fused)
    if cap is not None:
        planned = unmeasured(checkpoint)
        grouped = {name for cost in planned for name in cost.names}
        jobs = make_plan(checkpoint.folder, StorageOptions(DEFAULT), adapter).jobs
        limit, other = int(cap * 1e9), sum(job.nbytes for job in jobs if job.source.name not in grouped)
        smallest(planned, limit, other)
    costs = sensitivity(checkpoint, tokens, adapter=fused)
    proposal = None if cap is None else propose(costs, limit, other)
    if not write_json(args.json, measured(costs, proposal)):
        print(table(costs, proposal), flush=True)
    if proposal and args.save_recipe:
        told = f"proposed for at most {cap:g} GB by the KL of each group"
        save_recipe(args.save_recipe, proposal.matrices, CANDIDATES[0], told)
    return costs


def _size(nbytes: int, shapes: Iterable[tuple[int, ...]]) -> dict[str, Any]:
    return {"bytes": nbytes, "bits_per_weight": 8 * nbytes / sum(math.prod(shape) for shape in shapes)}


def _vision(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The vision encoder's size, and in a quantized folder the number of its unquantized matrices."""
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(VISION)}
    if not shapes:
        return None
    matrices = [name for name, shape in shapes.items() if is_matrix(name, shape)]
    left = sum(checkpoint.quantization(name) is None for name in matrices) if checkpoint.config.quantization else 0
    return {**_size(checkpoint.nbytes((VISION,)), shapes.values()), "matrices": len(matrices), "unquantized": left}


def _written(folder: Path, seconds: float) -> dict[str, Any]:
    """What a conversion has written, for --json."""
    checkpoint = open_checkpoint(folder)
    tensors = [*checkpoint.entries.values(), *checkpoint.fp32_original.values()]
    told = json.loads((folder / QUALITY).read_text(encoding="utf-8"))
    return {
        "folder": str(folder),
        "tensors": len(tensors),
        "files": len({entry.file for entry in tensors}),
        "bytes": sum(entry.nbytes for entry in tensors),
        "text_model": _size(checkpoint.nbytes(), text_shapes(checkpoint.config.text).values()),
        "vision_encoder": _vision(checkpoint),
        "adapter": told.get("adapter"),
        "against_source": told.get("evaluation"),
        "seconds": round(seconds, 1),
    }


def _summary(found: Mapping[str, Any]) -> str:
    """What `_written` found, as text."""

    def size(part: Mapping[str, Any]) -> str:
        return f"{part['bytes'] / 1e9:.3f} GB, {part['bits_per_weight']:.3f} bits per weight"

    several = "s" if found["files"] > 1 else ""
    lines = [
        f"wrote {found['folder']}: {found['tensors']} tensors in {found['files']} file{several}, "
        f"{found['bytes'] / 1e9:.3f} GB",
        f"text model: {size(found['text_model'])}",
    ]
    if vision := found["vision_encoder"]:
        left = vision["unquantized"]
        note = f", {left} of its {vision['matrices']} matrices unquantized" if left else ""
        lines.append(f"vision encoder: {size(vision)}{note}")
    if found["adapter"]:
        lines.append(f"adapter {described(found['adapter'])}")
    if quality := found["against_source"]:
        source = "the source with the adapter" if found["adapter"] else "the source"
        lines.append(
            f"against {source} on {quality['positions']} tokens: KL divergence {quality['kl']:.5f}, same most likely "
            f"token {quality['top1']:.2%}, perplexity {quality['perplexity']:.4f} (source "
            f"{quality['source_perplexity']:.4f})"
        )
    return "\n".join([*lines, f"time: {found['seconds']:.1f} s"])


if __name__ == "__main__":
    main()
