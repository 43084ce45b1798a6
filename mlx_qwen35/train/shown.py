"""How far a run has come, on standard error, and what it has come to, as text."""

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from mlx_qwen35.console.interrupt import as_typed
from mlx_qwen35.console.notices import tell
from mlx_qwen35.console.progress import Step, duration
from mlx_qwen35.console.table import size
from mlx_qwen35.train.loop import Line, Training, Watcher
from mlx_qwen35.train.record import many
from mlx_qwen35.train.trained import Trained

RECENT = 20  # steps whose seconds tell the time that is left
LONG = 5.0  # seconds of a step from which on its batches are shown


class Shown(Watcher):
    """Shows a run on standard error: a line that is written over, and one that stays for each validation.

    A context; where a run ends in it before its end, it says how to go on.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._step: Step | None = None
        self._what = ""
        self._training: Training | None = None
        self._rate = ""
        self._since: list[Line] = []  # the steps behind the last validation

    def __enter__(self) -> Self:
        return self

    def _begin(self, what: str, unit: str) -> Step:
        """The step that is shown from now on, the one before it ended."""
        if self._step is None or what != self._what:
            self.end()
            self._step, self._what = Step(what, unit, timed=True), what
            self._step.__enter__()
        return self._step

    def end(self) -> None:
        """Show nothing more."""
        if self._step:
            self._step.end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        training = self._training
        if training and isinstance(error, KeyboardInterrupt | SystemExit) and training.saved is not None:
            tell(
                f"stopped behind step {training.saved:,} of {training.steps:,}, saved in {training.folder.out}. "
                "The same command with --resume goes on"
            )

    def reads(self, what: str, done: int, total: int, unit: str) -> None:
        """So much of the data or of the weights is read; of 0 nothing is counted."""
        step = self._begin(what, unit)
        if total:
            step(done, total)

    def begins(self, training: Training) -> None:
        self._training = training
        rows, valid = training.rows, training.valid
        validated = ""
        if valid:
            count = min(len(valid), training.options.validation_rows or len(valid))
            validated = f", validated on {many(count, 'row')}"
        tell(
            f"training {many(len(training.state.parameters), 'map')} on {many(len(rows), 'row')} with "
            f"{rows.report.targets:,} targets{validated}"
        )
        if training.state.step:
            lines = training.log()
            tested = max((place for place, line in enumerate(lines, 1) if "validation" in line), default=0)
            self._since = [*lines[tested:]]
            tell(f"going on behind step {training.state.step:,} of {training.steps:,}")
        self._show("training")

    def moves(self, training: Training, what: str, done: int, total: int) -> None:
        if what == "validation" or not self._recent or self._recent[-1] > LONG:
            self._show(f"training{self._rate}, {what}, batch {done + 1} of {total}")

    def stepped(self, training: Training, line: Line, seconds: float) -> None:
        number = line["step"]
        if number:
            self._recent.append(seconds)
            self._since.append(line)
            self._rate = f", loss {line['loss']:.4f}, {line['tokens'] / max(seconds, 1e-3):,.0f} tokens/s"
        if "validation" in line:
            best = training.state.best
            lowest = ", the lowest so far" if best and best.step == number and number else ""
            loss = f"loss {_mean(self._since):.4f}, " if number else ""
            self._since.clear()
            tell(f"step {number:,} of {training.steps:,}: {loss}validation loss {line['validation']:.4f}{lowest}")
        self._show(f"training{self._rate}")

    def ends(self, training: Training) -> None:
        self._begin("asking the trained model", "")

    def _show(self, what: str) -> None:
        training = self._training
        assert training is not None
        left = None
        if self._recent:
            left = (training.steps - training.state.step) * sum(self._recent) / len(self._recent)
        self._begin("training", "steps").told(training.state.step, training.steps, left, what)


def _mean(lines: Sequence[Line]) -> float:
    """The loss of all targets of some steps."""
    return sum(line["loss"] * line["targets"] for line in lines) / sum(line["targets"] for line in lines)


def summary(trained: Trained) -> str:
    """What a run has come to."""
    run = trained.run
    lines = [f"wrote {trained.adapter}: {trained.kept}", f"{run.claim}. {run.ended}"]
    if cut := run.counts["train"].cut:
        rows, most = run.counts["train"].rows, run.options.max_length
        lines.append(f"{cut:,} of {rows:,} rows were longer than --max-length {most:,}, and lost their ends")
    lines.append(
        f"{many(trained.steps, 'step')}, {trained.tokens:,} tokens, {trained.targets:,} targets in "
        f"{duration(trained.seconds)}: {trained.tokens / max(trained.seconds, 1e-3):,.0f} tokens/s; peak memory "
        f"{size(trained.peak)}" + (f" (planned {size(run.planned)})" if run.planned else "")
    )
    lines.append(f"try it: {as_typed('mlx_qwen35.chat')} --model {run.model} --adapter {trained.adapter}")
    return "\n".join(lines)
