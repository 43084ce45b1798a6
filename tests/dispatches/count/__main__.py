"""python -m tests.dispatches.count --geometry 4b [--recipe mixed] [--mtp] [--compare mlx-lm,mlx-vlm] [--json FILE]"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_qwen35.checkpoint.random import GEOMETRIES, geometry

from .dispatches import OURS, PEERS, RECIPES, CountError, as_json, count_program, format_dispatches
from .draft_dispatches import count_drafts, format_drafts


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"must name some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    return names


def _rank(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text}")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {text}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.dispatches.count",
        description="Count the GPU launches of one decoded token, and the bytes that they move. Needs no GPU and no "
        "weights. Ends with status 1 if a program that was asked for could not be counted.",
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, required=True, help="the model's sizes")
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default="uniform",
        help="uniform (default): every matrix in 4 bits by groups of 64; mixed: attention's o_proj and DeltaNet's "
        "out_proj in 8 bits, DeltaNet's in_proj_a and in_proj_b not packed",
    )
    parser.add_argument(
        "--adapter", type=_rank, default=0, metavar="RANK", help="count ours with an adapter of this rank beside every "
        "matrix of the layers",
    )  # fmt: skip
    parser.add_argument("--mtp", action="store_true", help="count a step with 0 to 3 drafts too")
    parser.add_argument("--compare", type=_peers, default=(), help=f"some of {','.join(PEERS)}")
    parser.add_argument("--json", type=_file, metavar="FILE", help="file for everything that was counted")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    config, counts, failures = geometry(options.geometry), {}, {}
    for program in (OURS, *options.compare):
        try:
            rank = options.adapter if program == OURS else 0
            counts[program] = count_program(program, config, options.recipe, rank=rank)
        except CountError as error:
            failures[program] = f"error: {program} could not be counted: {error}"
    if OURS in failures:
        sys.exit(failures[OURS])
    title = f"GPU launches of one decoded token, geometry {options.geometry}, {options.recipe} recipe"
    title += f", an adapter of rank {options.adapter}" if options.adapter else ""
    print(format_dispatches(title, counts))
    drafts = count_drafts(config, options.recipe) if options.mtp else None
    if drafts:
        print(f"\n{format_drafts(drafts)}")
    if options.json:
        write_whole(options.json, as_json(options.geometry, options.recipe, counts, drafts))
    if failures:
        sys.exit("\n".join(failures.values()))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
