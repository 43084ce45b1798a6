"""What was found of the needles, by kind, length and depth: as a table, as JSON and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mlx_qwen35.bench.needle import ANSWER, DEPTHS, Answer
from mlx_qwen35.bench.report import header
from mlx_qwen35.console.table import align
from mlx_qwen35.errors import InputError

SHADES = " ░▒▓█"  # of a share of right answers, none to all
NO, YES = (247, 238, 214), (20, 92, 98)  # the same as colours
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
WIDTH, HEIGHT, SIDE, GAP = 72, 32, 70, 18  # pixels: of a cell, beside the cells for the depths, around and between


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


def draw(path: Path, title: Sequence[str], rows: Sequence[Row]) -> None:
    """A PNG file: for each kind a map with the lengths from left to right and the depths from top to bottom.

    InputError where it cannot be written.
    """
    maps = [(kind, [row for row in rows if row.kind == kind]) for kind in dict.fromkeys(row.kind for row in rows)]
    head, font = GAP + 22 * len(title) + GAP, ImageFont.load_default(14)
    across = [SIDE + WIDTH * len(own) + GAP for _, own in maps]
    width = max(GAP + sum(across), GAP + max(round(font.getlength(line)) for line in title) + GAP)
    image = Image.new("RGB", (width, head + 2 * 24 + HEIGHT * len(DEPTHS) + GAP), "white")
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(title):
        pen.text((GAP, GAP + 22 * i), line, "black", font)
    for (kind, own), left in zip(maps, (GAP + sum(across[:i]) for i in range(len(maps))), strict=True):
        _draw_map(pen, font, kind, own, left, head)
    try:
        image.save(path, "PNG")
    except OSError as error:
        raise InputError("output_unwritable", f"{path} must be a file that can be written: {error}") from error


def _draw_map(pen: ImageDraw.ImageDraw, font: Font, kind: str, rows: Sequence[Row], left: int, top: int) -> None:
    first, cells = left + SIDE, top + 24
    pen.text((first, top), kind, "black", font)
    for line, depth in enumerate(DEPTHS):
        y = cells + HEIGHT * line
        pen.text((first - 8, y + HEIGHT // 2), f"{depth:.0%}", "black", font, "rm")
        for column, row in enumerate(rows):
            x, share = first + WIDTH * column, row.right[line] / row.asked
            colour = tuple(round(no + share * (yes - no)) for no, yes in zip(NO, YES, strict=True))
            pen.rectangle((x, y, x + WIDTH - 2, y + HEIGHT - 2), colour)
            ink = "white" if share > 0.5 else "black"
            pen.text((x + WIDTH // 2, y + HEIGHT // 2), f"{share:.0%}", ink, font, "mm")
    for column, row in enumerate(rows):
        middle = first + WIDTH * column + WIDTH // 2
        pen.text((middle, cells + HEIGHT * len(DEPTHS) + 12), f"{row.length:,}", "black", font, "mm")
