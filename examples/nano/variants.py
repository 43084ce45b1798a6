"""Measures every way to convert nano, and prints a markdown table.

    python examples/nano/variants.py [--out DIR] [--items N] [--json FILE]

Each variant is converted, compared with its source on the answers of held-out text items (KL divergence, top-1,
perplexity), and asked held-out questions, some with pictures (greedy generation). Two variants run at a time, each
with one BLAS thread. The same versions on the same chip print the same table.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before numpy is imported; the processes of main() inherit it
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import json
import math
import multiprocessing
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from random import Random

from encoding import Encoder
from ours import completions, marks
from tasks import draw, items_of

import mlx_qwen35
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.shapes import text_shapes
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.evaluate import evaluate
from mlx_qwen35.convert.recipes import RECIPES
from mlx_qwen35.machine.chip import brand
from mlx_qwen35.measure.divergence import Evaluation

SEED = 0  # of the held-out items, as in evaluation.json
LESSONS = (
    "add_1", "add_2", "add_3", "repeat", "recall", "tool_city", "tool_name", "tool_report", "then_add", "then_recall",
    "identity", "greeting",
)  # fmt: skip
QUESTIONS = (
    "add_2", "add_3", "repeat", "recall", "then_add", "then_recall",
    "describe", "count", "colour", "shape", "nth_picture", "digits",
)  # fmt: skip
CALIBRATION = tuple(task for task in LESSONS if task not in ("add_1", "identity", "greeting"))  # have held-out items
ROUNDS = 6  # of one item of each of these and each mode; the converter reads the first 4,096 tokens
MODES = (False, True)  # thinking


@dataclass(frozen=True)
class Variant:
    """One way to convert: the options of the command, and the same as arguments of `convert`."""

    label: str
    options: Mapping[str, str | bool]
    calibrated: bool = False


VARIANTS = (
    *(Variant(f"--recipe {name}", {"recipe": name}) for name in RECIPES),
    Variant("--recipe 4bit --calibration", {"recipe": "4bit"}, calibrated=True),
    Variant("--recipe 4bit --rounding nearest", {"recipe": "4bit", "rounding": "nearest"}),
    Variant("-q", {"quantize": True}),
    Variant("-q --rounding nearest", {"quantize": True, "rounding": "nearest"}),
)


@dataclass(frozen=True)
class Held:
    """What is measured on: so many held-out items of each of these tasks and each mode."""

    items: int
    lessons: Sequence[str] = LESSONS  # compared with the source, the right completion given
    questions: Sequence[str] = QUESTIONS  # answered by generation


@dataclass(frozen=True)
class Row:
    """What one variant came to."""

    label: str
    nbytes: int  # of all tensors of the folder
    text_nbytes: int  # of the text model's, the embedding among them
    bits: float  # of a weight of the text model
    evaluation: Evaluation
    right: int  # answers, exact to the last token
    asked: int


# --- items -----------------------------------------------------------------------------------------------------------


def lessons(held: Held) -> tuple[list[list[int]], list[int]]:
    """The text items with their right completions.

    Returns token ids, and of each sequence the index of the first token of the completion.
    """
    encoder = Encoder()
    drawn = [item for task in held.lessons for mode in MODES for item in items_of(task, mode, held.items, SEED)]
    encoded = [encoder.lesson(item, []) for item in drawn]
    return [e.ids for e in encoded], [e.learn.index(True) for e in encoded]


def calibration_text() -> str:
    """Items with their right completions, all from the nine tenths that training saw: no lesson is among them."""
    encoder = Encoder()
    keys = [(task, thinking, i) for i in range(ROUNDS) for task in CALIBRATION for thinking in MODES]
    drawn = [draw(key[0], Random(f"calibration {key}"), held_out=False, thinking=key[1]) for key in keys]
    return "".join(f"{encoder.text(item)}{item.completion}<|im_end|>\n" for item in drawn)


def answers(folder: Path, held: Held) -> str:
    """Asks a converted folder the questions: "1" for each completion that is right to the last token, else "0"."""
    model, processor = mlx_qwen35.load(folder)
    asked = [items_of(task, mode, held.items, SEED) for task in held.questions for mode in MODES]
    return "".join(marks(completions(model, processor, some), some) for some in asked)


# --- variants --------------------------------------------------------------------------------------------------------


def measure(variant: Variant, out: Path, held: Held) -> Row:
    """Converts nano into a folder in `out`, replacing an earlier one, and measures it."""
    options = dict(variant.options)
    name = variant.label.replace("--", "").replace(" ", "-").strip("-")
    if variant.calibrated:
        text = out / f"{name}.txt"
        text.write_text(calibration_text(), encoding="utf-8")
        options["calibration"] = str(text)
    folder = convert("nano", out / name, overwrite=True, **options)
    packed = open_checkpoint(folder)
    weights = sum(math.prod(shape) for shape in text_shapes(packed.config.text).values())
    right = answers(folder, held)
    return Row(
        label=variant.label,
        nbytes=sum(entry.nbytes for entry in (*packed.entries.values(), *packed.fp32_original.values())),
        text_nbytes=packed.nbytes(),
        bits=8 * packed.nbytes() / weights,
        evaluation=evaluate(open_checkpoint(resolve("nano")), packed, *lessons(held)),
        right=right.count("1"),
        asked=len(right),
    )


# --- report ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    lines = [
        "| options | MB, all | MB, text | bits per weight | KL, 10⁻³ nats | top-1 | perplexity | answers right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        e = row.evaluation
        cells = [f"`{row.label}`", f"{row.nbytes / 1e6:.2f}", f"{row.text_nbytes / 1e6:.2f}", f"{row.bits:.2f}"]
        kl = round(1e3 * e.kl, 2) + 0.0  # no negative zero
        cells += [f"{kl:.2f} ± {1e3 * e.kl_error:.2f}", f"{100 * e.top1:.2f} %", f"{e.perplexity:.3f}"]
        lines.append("| " + " | ".join([*cells, f"{row.right} of {row.asked}"]) + " |")
    return "\n".join(lines)


def footnote(rows: Sequence[Row], items: int) -> str:
    """What was counted, on what machine."""
    e = rows[0].evaluation
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "numpy"))
    return (
        f"{items} held-out items of each task and mode (thinking off, on). KL, top-1, perplexity: {e.positions} answer "
        f"tokens of {e.sequences} text items (perplexity of the source: {e.source_perplexity:.3f}); ± is one standard "
        f"error over items. Answers: exact completions of greedy generation, {rows[0].asked} questions.\n"
        f"{brand()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {packages}, "
        "float32 arithmetic."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the converted folders here (default: they are deleted)")
    parser.add_argument("--items", type=int, default=10, help="held-out items of each task and mode (10)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.items < 1:
        parser.error(f"--items must be at least 1, got {args.items}")
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            for row in pool.map(partial(measure, out=out, held=Held(args.items)), VARIANTS):
                rows.append(row)
                print(f"{len(rows)} of {len(VARIANTS)}: {row.label}", file=sys.stderr, flush=True)
    print(f"{table(rows)}\n\n{footnote(rows, args.items)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
