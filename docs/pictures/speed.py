"""Prefill and decode speed beside other programs: python docs/pictures/speed.py [--measure], see drawing.py

--measure runs mlx_qwen35.bench on random weights of geometry mid, beside the peers that are installed.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drawing import benched, main

from mlx_qwen35.bench.measure import Measurement
from mlx_qwen35.bench.plot import draw as draw_bars
from mlx_qwen35.console import plot

PEERS = {"mlx-lm": "mlx_lm", "mlx-vlm": "mlx_vlm", "transformers": "torch"}


def measure(geometry: str = "mid", lengths: str = "128,1024", rounds: int = 5) -> dict[str, Any]:
    peers = ",".join(name for name, module in PEERS.items() if find_spec(module))
    given = ["--geometry", geometry, "--dtype", "float32", "--prompt-lengths", lengths, "--repeats", str(rounds)]
    return benched([*given, *(["--compare", peers] if peers else [])], "model", "settings", "runs")


def draw(path: Path, figures: dict[str, Any]) -> plot.Figure:
    machine, rounds = figures["machine"], figures["settings"]["repeats"]
    versions = ", ".join(text for text in machine["versions"].split(", ") if not text.endswith("not installed"))
    note = f"{figures['model']}, {figures['settings']['dtype']}, {rounds} rounds in turn. {machine['chip']}\n{versions}"
    return draw_bars(path, figures["model"], note, [Measurement(**run) for run in figures["runs"]])


if __name__ == "__main__":
    main(__file__, measure, draw)
