"""The memory plans of README's table as stacked bars, computed from headers alone: python docs/pictures/memory.py"""

import sys
from pathlib import Path

from drawing import FOLDER, ROOT

sys.path.append(str(ROOT / "tests/docs"))

from which_model import ROWS

from mlx_qwen35.budget.plan import MemoryPlan, mac, plan_memory
from mlx_qwen35.commands.fit import checkpoints
from mlx_qwen35.console import plot
from mlx_qwen35.doctor import picture
from mlx_qwen35.doctor.plan import CONTEXT, PIXELS


def plans() -> list[tuple[str, MemoryPlan]]:
    found = {(size, recipe): checkpoint for size, recipe, checkpoint in checkpoints(row[1:3] for row in ROWS)}
    return [
        (f"{gigabytes} GB: {size.upper()}, {recipe}",
         plan_memory(found[size, recipe], mac(gigabytes), CONTEXT, pixels=PIXELS))
        for gigabytes, size, recipe, _ in ROWS
    ]  # fmt: skip


def draw(path: Path) -> plot.Figure:
    found = plans()
    most = max(plan.image / plan.machine.limit for _, plan in found)
    title = f"With the right recipe a model takes at most {most:.0%} of what its Mac allows"
    note = f"Computed from the headers: {CONTEXT:,} tokens and an image of one megapixel. Nothing of this was measured."
    return picture.draw(path, title, note, found)


if __name__ == "__main__":
    draw(FOLDER / "memory.png")
