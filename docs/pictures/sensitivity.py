"""What quantizing each group of nano's matrices costs: python docs/pictures/sensitivity.py [--measure], see drawing.py

The same as mlx_qwen35.convert --hf-path nano --sensitivity TEXT --plot FILE, on the held-out lessons of the variants.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from drawing import machine, main
from variants import LESSONS, Held, lessons

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.console import plot
from mlx_qwen35.convert import sensitivity_plot
from mlx_qwen35.convert.sensitivity import GroupCost, sensitivity
from mlx_qwen35.quantization import Quantization


def measure(items: int = 3, tasks: tuple[str, ...] = LESSONS) -> dict[str, Any]:
    tokens, _ = lessons(Held(items, tasks))
    costs = sensitivity(open_checkpoint(resolve("nano")), tokens)
    return {"machine": machine(), "items": len(tokens), "costs": [asdict(cost) for cost in costs]}


def draw(path: Path, figures: dict[str, Any]) -> plot.Figure:
    costs = [
        GroupCost(**cost | {"quantization": cost["quantization"] and Quantization(**cost["quantization"])})
        for cost in figures["costs"]
    ]
    note = f"nano, {figures['items']} held-out items, against the unquantized source. {figures['machine']}."
    return sensitivity_plot.draw(path, "nano", note, costs)


if __name__ == "__main__":
    main(__file__, measure, draw)
