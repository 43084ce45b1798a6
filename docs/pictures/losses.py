"""Losses of nano while it learns three animals: python docs/pictures/losses.py [--measure], see drawing.py

The same as examples/finetune/finetune.py.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import ROOT, machine, main

sys.path.append(str(ROOT / "examples/finetune"))

from animals import ROWS, write
from finetune import OPTIONS, STEPS
from PIL import Image

from mlx_qwen35.console import plot as pictures
from mlx_qwen35.train import command, plot
from mlx_qwen35.train.record import Run, Step, Validation


def measure(steps: int = STEPS, rows: Mapping[str, int] = ROWS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "animals", Path(folder) / "adapter"
        write(data, rows)
        given = ["--model", "nano", "--data", str(data), "--adapter", str(out), "--steps", str(steps), *OPTIONS]
        command.main([*given, "--no-report"])
        log = [json.loads(line) for line in (out / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    made, columns = [line for line in log if line["step"]], ("loss", "learning_rate", "targets", "tokens")
    validations = {line["step"]: line["validation"] for line in log if "validation" in line}
    each = {name: [line[name] for line in made] for name in columns}
    return {"machine": machine(), "validations": validations} | each


def draw(path: Path, figures: dict[str, Any]) -> pictures.Figure:
    columns = zip(*(figures[name] for name in ("loss", "learning_rate", "targets", "tokens")), strict=True)
    steps = [Step(n, *column, seconds=0.0) for n, column in enumerate(columns, 1)]
    validations = [Validation(int(step), loss) for step, loss in figures["validations"].items()]
    best = min(validations, key=lambda own: own.loss)
    run = Run("nano", "animals", None, {}, steps, validations, best.step)
    figure = plot.draw(path, run, f"nano learns three animals in pictures, examples/finetune. {figures['machine']}.")
    with Image.open(path) as image:
        image.quantize(64, Image.Quantize.FASTOCTREE).save(path, optimize=True)  # half the bytes
    return figure


if __name__ == "__main__":
    main(__file__, measure, draw)
