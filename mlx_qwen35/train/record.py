"""What a training run was: its data, options, steps and validations, for the report and the picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Step(NamedTuple):
    """A step of the optimizer. loss: the mean of its targets. tokens: of all its rows. seconds: that it took."""

    step: int  # from 1
    loss: float
    learning_rate: float
    targets: int
    tokens: int
    seconds: float


class Validation(NamedTuple):
    """The mean loss of all targets of the validation rows after so many steps."""

    step: int  # 0: before the first
    loss: float


@dataclass(frozen=True)
class Counts:
    """A split of the data, as it is trained on.

    cut: rows that are too long, and lose tokens. images: and videos. skipped: rows that cutting leaves no target, which
    are not counted otherwise.
    """

    rows: int
    tokens: int
    targets: int
    cut: int = 0
    images: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Run:
    """A training run.

    model, data: as they were named. options: a frozen dataclass of options. counts: by split. best: the step whose
    adapter was kept; None: the last. ended: why it ended, as a sentence. peak, planned: bytes of memory. quantized:
    whether the model is. lost: steps that the log does not have any more.
    """

    model: str
    data: str
    options: Any
    counts: Mapping[str, Counts]
    steps: Sequence[Step]
    validations: Sequence[Validation] = ()
    best: int | None = None
    ended: str = ""
    peak: int | None = None
    planned: int | None = None
    quantized: bool = False
    lost: int = 0

    @property
    def kept(self) -> Validation | None:
        """The validation of the step whose adapter was kept; of a step without one, the last before it."""
        earlier = [own for own in self.validations if self.best is None or own.step <= self.best]
        return max(earlier, key=lambda own: own.step, default=None)

    def mean(self, start: int, stop: int) -> float | None:
        """The mean loss of the targets of the steps start + 1 to stop; None where there are none."""
        own = [step for step in self.steps if start < step.step <= stop]
        return mean_loss(own) if own else None

    @property
    def claim(self) -> str:
        """What the losses say, in one line."""
        kept = self.kept
        if kept and len(self.validations) > 1:
            first, last = self.validations[0].loss, kept.loss
            if last < first:
                first_text, last_text = apart(first, last)
                return f"Validation loss fell from {first_text} to {last_text} in {many(kept.step, 'step')}"
            return f"Validation loss did not fall below the {loss_text(first)} before the first step"
        if not self.steps:
            return "The losses are lost" if self.lost else "No step was made"
        count, tenth = len(self.steps), -(-len(self.steps) // 10)
        first, last = mean_loss(self.steps[:tenth]), mean_loss(self.steps[-tenth:])
        begin, end = ("the first", "the last") if tenth == 1 else (f"the first {tenth:,}", f"the last {tenth:,}")
        if count == 1:
            return f"Training loss: {loss_text(first)} in the only step"
        return f"Training loss: {loss_text(first)} in {begin} of {count:,} steps, {loss_text(last)} in {end}"


def mean_loss(steps: Sequence[Step]) -> float:
    """Of all targets of some steps."""
    return sum(step.loss * step.targets for step in steps) / sum(step.targets for step in steps)


def apart(first: float, last: float) -> tuple[str, str]:
    """Two losses, in as many digits from three on as tell them apart."""
    if loss_text(first) != loss_text(last):
        return loss_text(first), loss_text(last)
    return f"{first:.4f}", f"{last:.4f}"


def many(count: int, what: str) -> str:
    """1 step, 2,000 steps."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def loss_text(loss: float | None) -> str:
    """Three digits: 6.18, 0.0512."""
    return "" if loss is None else f"{loss:#.3g}"
