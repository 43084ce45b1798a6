"""The table of hours of docs/finetune.md, computed from headers alone: python tests/docs/training_table.py"""

from mlx_qwen35.budget.roofline import PREFILL, prefill_operations
from mlx_qwen35.commands.fit import checkpoints
from mlx_qwen35.machine.chip import parse_chip
from mlx_qwen35.train.dry_run import PASSES

TOKENS, ROW, ANSWERS = 1_000_000, 1024, 3  # in all, of a row, and of which one in so many is a target
CHIPS = {"M1": "M1", "M4": "M4", "M1, M2 Pro": "M1 Pro", "M1, M2 Max": "M1 Max", "M4 Max": "M4 Max"}


def table() -> list[str]:
    """Lines of markdown."""
    rows = [("model", *CHIPS), ("---",) * (1 + len(CHIPS))]
    for size, _, checkpoint in checkpoints([(size, "4bit") for size in ("2b", "4b", "9b")]):
        config = checkpoint.config.text
        layers = PASSES * prefill_operations(config, ROW) * TOKENS / ROW
        head = 4 * TOKENS / ANSWERS * config.vocab_size * config.hidden_size
        speeds = (PREFILL * parse_chip(f"Apple {chip}").flops for chip in CHIPS.values())
        rows.append((size.upper(), *(f"{(layers + head) / speed / 3600:.1f}" for speed in speeds)))
    return [f"| {' | '.join(cells)} |" for cells in rows]


if __name__ == "__main__":
    print(*table(), sep="\n")
