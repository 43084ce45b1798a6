"""--dry-run: rows, tokens, steps, memory and hours of a run, from headers and data alone."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_qwen35.backend import backend
from mlx_qwen35.budget.plan import in_gb
from mlx_qwen35.budget.roofline import PREFILL, prefill_operations
from mlx_qwen35.budget.training import TrainingPlan
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.shapes import is_matrix, mtp_shapes
from mlx_qwen35.console.progress import duration
from mlx_qwen35.console.table import align
from mlx_qwen35.machine.chip import Chip, this_chip
from mlx_qwen35.train.rows import RowFile
from mlx_qwen35.train.training import Prepared

PASSES = 3  # of the layers: forward, forward again for the way back, and back to the inputs of each product


def operations(config: TextConfig, rows: RowFile, passes: int = PASSES) -> float:
    """Operations that all rows of a file take once: `passes` times the layers, and the output matrix for each target
    forward, and back where there are several passes. What low-rank parts add, some hundredths, is left out.
    """
    own = rows.report
    head = 2 * min(2, passes) * own.targets * config.vocab_size * config.hidden_size
    return passes * own.rows * prefill_operations(config, max(1, own.tokens // own.rows)) + head


def draft_operations(config: TextConfig, rows: RowFile) -> float:
    """Operations of the draft head over all rows of a file once, trained along; its attention is left out."""
    own, shapes = rows.report, mtp_shapes(config).items()
    weights = sum(math.prod(shape) for name, shape in shapes if is_matrix(name, shape))
    return 2 * PASSES * weights * own.tokens + 4 * own.targets * config.vocab_size * config.hidden_size


def seconds(found: Prepared, chip: Chip | None) -> float | None:
    """Of all steps and validations, computed: their operations over `PREFILL` of the chip's peak, which published runs
    of prefill reach; None where the peak is not known.
    """
    if chip is None or not chip.knows_flops:
        return None
    config = found.checkpoint.config.text
    total = operations(config, found.rows) + found.options.draft_head * draft_operations(config, found.rows)
    total *= found.steps / len(found.order)
    if found.valid is not None:
        share = min(1.0, (found.options.validation_rows or math.inf) / len(found.valid))
        times = 1 + math.ceil(found.steps / found.options.validated_every)
        total += times * share * operations(config, found.valid, passes=1)
    return total / (PREFILL * chip.flops)


@dataclass(frozen=True)
class Outlook:
    """What a run would be. seconds: computed; None where the chip's peak is not known, as of a CPU."""

    found: Prepared
    seconds: float | None

    def described(self) -> str:
        """Text of a few paragraphs."""
        found = self.found
        rows: list[Sequence[str]] = [("rows of", "rows", "tokens", "longest", "targets", "images", "cut", "skipped")]
        for split, file in found.files.items():
            own = file.report
            counts = (own.rows, own.tokens, int(file.lengths.max()), own.targets, own.images, own.cut, own.skipped)
            rows.append((split, *(f"{count:,}" for count in counts)))
        numbers = sum(part.numbers for part in found.parts.values())
        lines = [
            *align(rows), "",
            f"trained: low-rank parts of {len(found.parts):,} maps, {numbers:,} numbers in float32",
            f"steps: {found.steps:,}, of {found.options.batch_size * found.options.accumulate:,} rows each "
            f"({len(found.order):,} in an epoch, which sees every row once)",
            self._memory(),
            self._time(),
        ]  # fmt: skip
        return "\n".join([*lines, *found.notes])

    def as_json(self) -> dict[str, Any]:
        """For --json; `seconds` is null where it is not known, `memory` is the bytes of the plan."""
        found = self.found
        return {
            "model": found.model, "data": str(found.data), "steps": found.steps, "steps_per_epoch": len(found.order),
            "rows": {split: asdict(file.report) for split, file in found.files.items()},
            "maps": {name: part._asdict() for name, part in found.parts.items()}, "seconds": self.seconds,
            "memory": self.plan.peak, "notes": found.notes, "options": asdict(found.options),
        }  # fmt: skip

    @property
    def plan(self) -> TrainingPlan:
        return self.found.plan

    def _memory(self) -> str:
        plan = self.plan
        most = "a step of the optimizer" if plan.working == plan.update else "a batch"
        return (
            f"memory: {in_gb(plan.peak)} of the {in_gb(plan.machine.limit)} that it may take; weights "
            f"{in_gb(plan.weights)}, what is trained and kept of it {in_gb(plan.held - plan.weights)}, {most} "
            f"{in_gb(plan.working)}"
        )

    def _time(self) -> str:
        if self.seconds is None:
            where = "this chip's speed is not known" if backend().fused_kernels else "of a CPU it is not computed"
            return f"time: unknown ({where}); the run shows the time left after its first steps"
        return (
            f"time: about {duration(self.seconds)}, computed from operations and {PREFILL:.0%} of the chip's published "
            "peak; nothing was measured"
        )


def look_ahead(found: Prepared) -> Outlook:
    """What a run on this machine would be."""
    return Outlook(found, seconds(found, this_chip() if backend().watchdog else None))
