"""What was found of the needles, by kind, length and depth: as a table, as JSON and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.bench.needle import ANSWER, DEPTHS, Answer
from mlx_qwen35.bench.report import header
from mlx_qwen35.console import plot
from mlx_qwen35.console.table import align

NUMBERS = {"single": "single numbers", "several": "several in a text", "chain": "chains"}  # kind -> what is found
SHADES = " ░▒▓█"  # of a share of right answers, none to all


@dataclass(frozen=True)
class Row:
    """A kind of text at one length."""

    kind: str
    length: int
    right: tuple[int, ...]  # answers, at each of DEPTHS
    asked: int  # at each of them
    seconds: float  # of a round


def summarize(answers: Sequence[Answer]) -> list[Row]:
    """A row for each kind and length, in their order."""
    found = []
    for kind in dict.fromkeys(answer.kind for answer in answers):
        for length in dict.fromkeys(answer.length for answer in answers):
            own = [answer for answer in answers if (answer.kind, answer.length) == (kind, length)]
            if not own:  # it was interrupted
                continue
            right = tuple(sum(answer.right for answer in own if answer.depth == depth) for depth in DEPTHS)
            asked = len(own) // len(DEPTHS)
            found.append(Row(kind, length, right, asked, sum(answer.seconds for answer in own) / len(own)))
    return found


def format_table(machine: Mapping[str, str], model: str, rows: Sequence[Row]) -> str:
    """The text the command prints."""
    depths = [f"{depth:.0%}" for depth in DEPTHS]
    return "\n".join(
        [
            *header(machine),
            f"{'model:':10}{model}; greedy, thinking off, at most {ANSWER} tokens an answer",
            "",
            *align([("text", "tokens", *depths, "all", "a round")] + [_cells(row) for row in rows]),
            "",
            "right answers of those asked, by the depth of the number in the text. single: one number in it; several:",
            "one at each depth; chain: the same, each handed on from key to key. a round: seconds for all questions",
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    shares = (f"{SHADES[(len(SHADES) - 1) * right // row.asked]} {right}/{row.asked}" for right in row.right)
    asked = row.asked * len(row.right)
    return (row.kind, f"{row.length:,}", *shares, f"{sum(row.right) / asked:.0%}", f"{row.seconds:.1f} s")


def as_json(
    machine: Mapping[str, str], model: str, rows: Sequence[Row], answers: Sequence[Answer]
) -> dict[str, Any]:
    """Every answer, and the counts."""
    return {
        "machine": dict(machine), "model": model, "depths": DEPTHS, "rows": [asdict(row) for row in rows],
        "answers": [asdict(answer) | {"right": answer.right} for answer in answers],
    }  # fmt: skip


def draw(path: Path, model: str, note: str, rows: Sequence[Row]) -> plot.Figure:
    """A PNG file: for each kind a map with the lengths from left to right and the depths from top to bottom.

    note: what was asked of what, to stand below.
    """
    kinds = {kind: [row for row in rows if row.kind == kind] for kind in dict.fromkeys(row.kind for row in rows)}
    found = [f"{_share(own):.0%} of {NUMBERS[kind]}" for kind, own in kinds.items()]
    note += "\nRight answers of those asked, by the depth of the number in the text and the length of the text."
    with plot.picture(path, f"{model} finds {', '.join(found)}", note, 3.6, len(kinds)) as (figure, panels):
        for axes, (kind, own) in zip(panels, kinds.items(), strict=True):
            _draw_map(axes, kind, own)
        for axes in panels[1:]:
            axes.set_yticks([])
        panels[0].set_ylabel("depth of the number")
    return figure


def _draw_map(axes: plot.Axes, kind: str, rows: Sequence[Row]) -> None:
    shares = [[row.right[line] / row.asked for row in rows] for line in range(len(DEPTHS))]
    axes.pcolormesh(shares, cmap=plot.shades(), vmin=0, vmax=1, edgecolor=plot.PAPER, linewidth=2)
    for line, found in enumerate(shares):
        for column, (row, share) in enumerate(zip(rows, found, strict=True)):
            ink = plot.PAPER if share > 0.8 else plot.INK
            text = f"{row.right[line]}/{row.asked}"
            axes.text(column + 0.5, line + 0.5, text, ha="center", va="center", color=ink, size=8)
    axes.set_title(f"{kind}: {_share(rows):.0%}")
    axes.set_xticks([column + 0.5 for column in range(len(rows))], [f"{row.length:,}" for row in rows])
    axes.set_yticks([line + 0.5 for line in range(len(DEPTHS))], [f"{depth:.0%}" for depth in DEPTHS])
    axes.set_xlabel("tokens of the prompt")
    axes.spines.bottom.set_visible(False)
    axes.invert_yaxis()


def _share(rows: Sequence[Row]) -> float:
    return sum(sum(row.right) for row in rows) / sum(row.asked * len(row.right) for row in rows)
