"""--dry-run: rows, tokens, steps, memory and hours of a run, from headers and data alone."""

import math
from typing import Any

from mlx_qwen35.backend import backend
from mlx_qwen35.budget.roofline import PREFILL, prefill_operations
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.console.progress import duration
from mlx_qwen35.console.table import align, size
from mlx_qwen35.machine.chip import Chip, this_chip
from mlx_qwen35.train.options import RANK
from mlx_qwen35.train.training import Prepared

PASSES = 3  # forward, once more for the backward pass, and backward for the inputs of each product


def operations(config: TextConfig, tokens: int, rows: int, targets: int) -> float:
    """Operations of rows of so many tokens in all: `PASSES` times the layers, and the output matrix of each target
    forward and backward. What low-rank parts add is left out, some hundredths.
    """
    layers = PASSES * prefill_operations(config, max(1, tokens // max(1, rows))) * rows
    return layers + 2 * 2 * targets * config.vocab_size * config.hidden_size


def seconds(found: Prepared, chip: Chip | None) -> float | None:
    """Of all steps, computed: operations over `PREFILL` of the chip's peak; None where that is not known."""
    if chip is None or not chip.knows_flops:
        return None
    own, config = found.rows.report, found.checkpoint.config.text
    total = found.epochs * operations(config, own.tokens, own.rows, own.targets)
    if found.valid is not None:
        other, share = found.valid.report, found.validated / len(found.valid)
        once = operations(config, other.tokens, other.rows, other.targets) / PASSES
        total += once * share * (1 + math.ceil(found.steps / found.options.validate_every))
    return total / (PREFILL * chip.flops)
