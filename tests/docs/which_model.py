"""README's table of models for Macs, computed from headers alone: python tests/docs/which_model.py

Its figures are those of `mlx_qwen35 models fit`. Nothing of this is measured.
"""

from collections.abc import Iterator

from mlx_qwen35.budget.plan import mac
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.commands.fit import checkpoints, fit

# GB of memory, member of the family, recipe, and the chips that Macs with this memory are sold with.
ROWS = (
    (8, "2b", "8bit", ("M1",)), (8, "4b", "4bit", ("M1",)),
    (16, "4b", "8bit", ("M1", "M4", "M1 Pro")), (16, "9b", "4bit", ("M1", "M4", "M1 Pro")),
    (24, "9b", "8bit", ("M4",)), (32, "27b", "4bit", ("M4", "M1 Pro", "M1 Max")), (64, "27b", "8bit", ("M1 Max",)),
)  # fmt: skip
CHIPS = {"M1": "M1", "M4": "M4", "M1 Pro": "M1, M2 Pro", "M1 Max": "M1, M2 Max"}


def row(checkpoint: Checkpoint, gigabytes: int, size: str, recipe: str, sold: tuple[str, ...]) -> Iterator[str]:
    machine = mac(gigabytes)
    found = fit(size, recipe, checkpoint, machine, 0)
    yield from (f"{gigabytes} GB", f"{size.upper()}, `{recipe}`")
    yield f"{found.memory / 1e9:.1f} of {machine.limit / 1e9:.1f} GB"
    yield f"{1 << found.longest.bit_length() - 1:,}"
    for chip in CHIPS:
        speed = fit(size, recipe, checkpoint, mac(gigabytes, chip=chip), 0).speed
        yield f"{speed:.0f}" if chip in sold else "–"


def table() -> list[str]:
    """Lines of markdown."""
    first, *others = CHIPS.values()
    heads = ("Mac", "model, recipe", "memory", "context", f"tokens/s: {first}", *others)
    found = {(size, recipe): found for size, recipe, found in checkpoints(row[1:3] for row in ROWS)}
    rows = [tuple(row(found[line[1:3]], *line)) for line in ROWS]
    return [f"| {' | '.join(cells)} |" for cells in (heads, ("---",) * len(heads), *rows)]


if __name__ == "__main__":
    print(*table(), sep="\n")
