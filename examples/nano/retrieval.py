"""Measures how nano finds a number in a long text, by length, depth and facts, and prints a markdown table.

    python examples/nano/retrieval.py --json mlx_qwen35/nano/retrieval.json
    python examples/nano/retrieval.py --lengths 8192 16384 --factors 1 2 4

Texts are held out of the training, thinking is off, decoding greedy, the answer right if it is the very number. A
chance answer is right once in 90. `--factors` above 1 read the same weights with YaRN (arXiv:2309.00071), whose
original length is that of the longest rows of the training, at lengths that fit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from encoding import FOLDER
from ours import completions, marks
from tasks import draw
from tasks.needles import MOST, needle

import mlx_qwen35

TRAINED = 4096  # tokens of the longest rows of the training
FRAME = 40  # tokens around the text at most: a system message, the question and the turns' marks
LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FEW, MANY = 8, 0  # facts in a text; many: a ninth of its tokens, 400 at most


@dataclass(frozen=True)
class Found:
    """How many of the items of one length, depth, number of facts and YaRN factor are answered right."""

    length: int  # tokens of the prompt, at most
    depth: float
    facts: int
    factor: float
    items: int
    right: int


@contextmanager
def scaled(folder: Path, factor: float) -> Iterator[Path]:
    """The checkpoint's folder, or for a factor above 1 a copy whose config asks for YaRN."""
    if factor == 1:
        yield folder
        return
    with tempfile.TemporaryDirectory() as out:
        copy = Path(shutil.copytree(folder, Path(out) / folder.name))
        config = json.loads((copy / "config.json").read_text())
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": TRAINED}
        config["text_config"]["rope_parameters"] |= yarn
        (copy / "config.json").write_text(json.dumps(config))
        yield copy


def measure(folder: Path, factor: float, length: int, facts: int, items: int) -> Iterator[Found]:
    """One result for each depth."""
    with scaled(folder, factor) as path:
        model, processor = mlx_qwen35.load(path)
        for depth in DEPTHS:
            task = needle(length - FRAME, facts or min(MOST, length // 9), depth)
            drawn = [draw(task, Random(f"{length} {facts} {depth} {i}"), thinking=False) for i in range(items)]
            right = marks(completions(model, processor, drawn), drawn).count("1")
            yield Found(length, depth, facts, factor, items, right)


def table(found: list[Found]) -> str:
    """The shares of right answers, a row for each length, number of facts and factor."""
    rows: dict[tuple[str, ...], list[Found]] = {}
    for f in found:
        head = (str(f.length), str(f.facts or min(MOST, f.length // 9)), f"{f.factor:g}" if f.factor > 1 else "")
        rows.setdefault(head, []).append(f)
    lines = ["| tokens | facts | YaRN | " + " | ".join(f"{d:g}" for d in DEPTHS) + " | all |"]
    lines.append("|" + "---|" * (4 + len(DEPTHS)))
    for head, some in rows.items():
        shares = [f.right / f.items for f in some]
        cells = [f"{100 * share:.0f} %" for share in (*shares, sum(shares) / len(shares))]
        lines.append("| " + " | ".join((*head, *cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="tokens of a prompt")
    parser.add_argument("--facts", type=int, nargs="*", default=(1, FEW, MANY), help="in a text; 0: as many as 400")
    parser.add_argument("--factors", type=float, nargs="*", default=(1.0,), help="of YaRN; 1: without")
    parser.add_argument("--items", type=int, default=20, help="of each length, depth, number of facts and factor")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    found = []
    for length in args.lengths:
        for facts in args.facts:
            for factor in (f for f in args.factors if f == 1 or length <= f * TRAINED):
                found += measure(args.folder, factor, length, facts, args.items)
                print(table(found[-len(DEPTHS) :]).splitlines()[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(f) for f in found], indent=1) + "\n")
    print("\n" + table(found))


if __name__ == "__main__":
    main()
