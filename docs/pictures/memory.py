"""The memory plans of README's table as stacked bars, computed from headers alone: python docs/pictures/memory.py"""

import sys
import tempfile
from pathlib import Path

from drawing import FOLDER, ROOT

sys.path.append(str(ROOT / "tests/docs"))

from which_model import CONTEXT, PIXELS, ROWS, write_headers

from mlx_qwen35.budget.plan import MemoryPlan, mac, plan_memory
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.console import plot
from mlx_qwen35.convert.planned import planned
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.doctor import picture


def plans() -> list[tuple[str, MemoryPlan]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = dict.fromkeys(size for _, size, _, _ in ROWS)
        sources = {size: write_headers(Path(folder) / size, geometry(size)) for size in sizes}
        for gigabytes, size, recipe, _ in ROWS:
            checkpoint = planned(sources[size], StorageOptions(recipe))
            plan = plan_memory(checkpoint, mac(gigabytes), CONTEXT, pixels=PIXELS)
            found.append((f"{gigabytes} GB: {size.upper()}, {recipe}", plan))
    return found


def draw(path: Path) -> plot.Figure:
    found = plans()
    most = max(plan.image / plan.machine.limit for _, plan in found)
    title = f"With the right recipe a model takes at most {most:.0%} of what its Mac allows"
    note = f"Computed from the headers: {CONTEXT:,} tokens and an image of one megapixel. Nothing of this was measured."
    return picture.draw(path, title, note, found)


if __name__ == "__main__":
    draw(FOLDER / "memory.png")
