"""KL divergence against size, over the recipes, on nano: python docs/pictures/recipes.py [--measure], see drawing.py

--measure runs examples/nano/variants.py, which prints the table of docs/convert.md.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drawing import ROOT, machine, main

from mlx_qwen35.console import plot

LITTLE = 1e-3  # nats a token
INTEGER, FLOATING = ("8bit", "6bit", "5bit", "4bit"), ("nvfp4", "mxfp4")


def measure(*options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        script = [sys.executable, str(ROOT / "examples/nano/variants.py"), "--json", str(rows), *options]
        subprocess.run(script, check=True)
        return {"machine": machine(), "rows": json.loads(rows.read_text())}


def draw(path: Path, figures: dict[str, Any]) -> plot.Figure:
    rows = {row["label"].removeprefix("--recipe "): row for row in figures["rows"]}
    integer, floating = ([name for name in names if name in rows] for names in (INTEGER, FLOATING))
    small = [int(name[0]) for name in integer if rows[name]["evaluation"]["kl"] < LITTLE]
    source = rows["4bit"]["evaluation"]
    fours = [rows[name]["evaluation"]["kl"] for name in ("4bit", *floating)]
    four = f"{min(fours):.1g} to {max(fours):.1g} in 4 bit"
    title = f"nano diverges by < {LITTLE:g} nats a token down to {min(small)} bit, by {four}"
    note = (
        f"nano, {source['positions']:,} tokens of the answers to {source['sequences']} held-out items, against the "
        f"unquantized source. {figures['machine']}.\nLines: one standard error. What holds for the 4B must be measured "
        "on the 4B: mlx_qwen35.convert --eval TEXT."
    )
    with plot.picture(path, title, note, 4.2) as (figure, (axes,)):
        _points(axes, [rows[name] for name in integer], plot.BLUE, "-")
        _points(axes, [rows[name] for name in floating], plot.ORANGE, "")
        axes.set_yscale("log")
        axes.set_ylim(0.01, 12)
        axes.set_xlim(4, 9)
        axes.set_xlabel("size: bits a weight of the text model, with scales and what stays unquantized")
        axes.set_title("KL divergence from the source, 10⁻³ nats a token")
        plot.decades(axes.yaxis)
        plot.round_ticks(axes.xaxis)
    return figure


def _points(axes: plot.Axes, rows: Sequence[dict[str, Any]], colour: str, line: str) -> None:
    """A mark for each recipe, with its name."""
    bits = [row["bits"] for row in rows]
    kl, errors = ([1e3 * row["evaluation"][name] for row in rows] for name in ("kl", "kl_error"))
    axes.errorbar(bits, kl, errors, color=colour, marker="o", linestyle=line)
    for row, x, y in zip(rows, bits, kl, strict=True):
        name = row["label"].removeprefix("--recipe ")
        place, side = ((-8, -3), "right") if name in FLOATING else ((6, 5), "left")
        plot.label(axes, name, x, y, place, ha=side, color=colour, size=10)


if __name__ == "__main__":
    main(__file__, measure, draw)
