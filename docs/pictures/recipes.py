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

SHIFTS = {"mxfp4": (6, 5), "nvfp4": (8, -10), "4bit": (8, 3)}  # points: where a name stands beside its mark


def measure(*options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        script = [sys.executable, str(ROOT / "examples/nano/variants.py"), "--json", str(rows), *options]
        subprocess.run(script, check=True)
        return {"machine": machine(), "rows": json.loads(rows.read_text())}


def draw(path: Path, figures: dict[str, Any]) -> plot.Figure:
    rows = {row["label"].removeprefix("--recipe "): row for row in figures["rows"] if row["evaluation"]["kl"] > 1e-6}
    recipes = {name: row for name, row in rows.items() if " " not in name and not name.startswith("-")}
    evaluation = recipes["4bit"]["evaluation"]
    title = f"8 bit changes next to nothing (KL {_kl(recipes, '8bit'):.2g}), 4 bit little (KL {_kl(recipes, '4bit'):.2g})"
    note = (
        f"nano, {evaluation['positions']:,} tokens of the answers to {evaluation['sequences']} held-out items, "
        "against the unquantized source. Lines: one standard error.\n"
        f"{figures['machine']}. What holds for the 4B must be measured on the 4B: convert --eval."
    )
    with plot.picture(path, title, note, 4.4) as (figure, (axes,)):
        integer = sorted((row["bits"], name) for name, row in recipes.items() if name.endswith("bit"))
        _points(axes, recipes, [name for _, name in integer], plot.BLUE, "affine, searched rounding", "-")
        _points(axes, recipes, ["nvfp4", "mxfp4"], plot.ORANGE, "floating point", "")
        axes.set_yscale("log")
        axes.set_xlabel("bits a weight of the text model, everything counted")
        axes.set_title("KL divergence from the source, 10⁻³ nats a token")
        axes.legend()
    return figure


def _kl(recipes: dict[str, Any], name: str) -> float:
    return 1e3 * recipes[name]["evaluation"]["kl"]


def _points(axes: plot.Axes, recipes: dict[str, Any], names: Sequence[str], colour: str, label: str, line: str) -> None:
    bits = [recipes[name]["bits"] for name in names]
    kl, errors = [_kl(recipes, name) for name in names], [1e3 * recipes[name]["evaluation"]["kl_error"] for name in names]
    axes.errorbar(bits, kl, errors, color=colour, marker="o", linestyle=line, label=label)
    for name, x, y in zip(names, bits, kl, strict=True):
        plot.label(axes, name, x, y, SHIFTS.get(name, (8, 3)), ha="left", color=colour)


if __name__ == "__main__":
    main(__file__, measure, draw)
