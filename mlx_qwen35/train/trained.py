"""What a run has come to, as values."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.machine.versions import versions
from mlx_qwen35.train.loop import Training
from mlx_qwen35.train.record import Counts, Run, Step, Validation
from mlx_qwen35.train.rows import RowFile


@dataclass(frozen=True)
class Trained:
    """A run that has ended, of this process and of those that had a part in it.

    adapter: its folder. kept: in words, which parameters it holds. tokens, targets: of all steps. seconds: of all
    steps, validation included. peak: bytes of memory, of the process that took the most. steps: how many were made.
    """

    adapter: Path
    kept: str
    run: Run
    tokens: int
    targets: int
    seconds: float
    peak: int
    steps: int

    @classmethod
    def of(cls, training: Training, run: Run) -> "Trained":
        tokens, targets = (sum(getattr(step, name) for step in run.steps) for name in ("tokens", "targets"))
        state = training.state
        return cls(training.folder.out, training.kept, run, tokens, targets, state.seconds, state.peak, state.step)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-3)

    def as_json(self) -> dict[str, Any]:
        """For --json; losses are means over targets, memory is in bytes."""
        run = self.run
        ends = [*run.steps[:1], *run.steps[-1:]]
        return {
            "adapter": str(self.adapter), "model": run.model, "data": run.data, "kept": self.kept, "ended": run.ended,
            "steps": self.steps, "loss": dict(zip(("first", "last"), (step.loss for step in ends), strict=False)),
            "validation": {own.step: own.loss for own in run.validations}, "best_step": run.best,
            "rows": {split: asdict(counts) for split, counts in run.counts.items()},
            "tokens": self.tokens, "targets": self.targets, "seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens_per_second, 1), "peak_memory": self.peak,
            "planned_memory": run.planned, "options": asdict(run.options),
            "versions": versions(),
        }  # fmt: skip


def counted(rows: RowFile) -> Counts:
    """What a split holds."""
    own = rows.report
    return Counts(own.rows, own.tokens, own.targets, own.cut, own.images, own.skipped)


def run_of(training: Training, model: str, data: str, planned: int | None, quantized: bool = False) -> Run:
    """The record of a run, from its log. planned: bytes of memory. quantized: whether the model is."""
    lines, seconds = training.log(), training.seconds()
    files = {"train": training.rows} | ({"valid": training.valid} if training.valid else {})
    best = training.state.best
    ended = "All steps were made."
    if training.early:
        ended = f"Validation ended it: {training.state.stale} times without a lower loss."
    if training.lost:
        ended += f" The log has lost {training.lost:,} of {training.state.step:,} steps."
    return Run(
        model, data, training.options, {split: counted(rows) for split, rows in files.items()},
        [Step(line["step"], line["loss"], line["learning_rate"], line["targets"], line["tokens"],
              seconds.get(line["step"], 0.0)) for line in lines if line["step"]],
        [Validation(line["step"], line["validation"]) for line in lines if "validation" in line],
        best and best.step, ended, training.state.peak, planned, quantized, training.lost,
    )  # fmt: skip
