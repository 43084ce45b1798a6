"""Which numbers nano finds in long texts: python docs/pictures/needles.py [--measure], see drawing.py

--measure runs mlx_qwen35.bench --model nano --needle 300,1k,2k --repeats 4.
"""

from pathlib import Path
from typing import Any

from drawing import benched, main

from mlx_qwen35.bench.heatmap import Row
from mlx_qwen35.bench.heatmap import draw as draw_maps
from mlx_qwen35.console import plot


def measure(lengths: str = "300,1k,2k", repeats: int = 4) -> dict[str, Any]:
    return benched(["--model", "nano", "--needle", lengths, "--repeats", str(repeats)], "model", "rows")


def draw(path: Path, figures: dict[str, Any]) -> plot.Figure:
    rows = [Row(**row | {"right": tuple(row["right"])}) for row in figures["rows"]]
    note = f"{figures['model']}; {figures['machine']['versions'].split(',')[1].strip()}, {figures['machine']['chip']}"
    return draw_maps(path, "nano", note, rows)


if __name__ == "__main__":
    main(__file__, measure, draw)
