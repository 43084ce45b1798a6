"""How far an evaluation has come, on standard error, and how to go on with one that was ended."""

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from mlx_qwen35.console.notices import tell
from mlx_qwen35.console.progress import Step

LEAST = 3  # questions that are answered before the time left is told


class Shown:
    """Shows an evaluation: a line that is written over for each thing that is done. A context."""

    def __init__(self, out: Path | None = None):
        self._out = out
        self._step: Step | None = None
        self._what = ""
        self._first: tuple[int, float] = 0, 0.0  # done, and when, where the step began
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self._out and isinstance(error, KeyboardInterrupt | SystemExit):
            tell(f"stopped{self._last}. What was answered is in {self._out}: the same command goes on")

    def watch(self, what: str, done: int, total: int, unit: str) -> None:
        """So much is done, of so much."""
        if self._step is None or what != self._what:
            self._end()
            self._step, self._what, self._first = Step(what, unit), what, (done, time.monotonic())
            self._step.__enter__()
        self._last = f" behind {done:,} of {total:,} {unit}" if unit == "questions" else ""
        self._step.told(done, total, self._left(done, total))

    def _left(self, done: int, total: int) -> float | None:
        """Seconds, by the mean of this step."""
        since, began = self._first
        if done - since < LEAST:
            return None
        return (total - done) * (time.monotonic() - began) / (done - since)

    def _end(self) -> None:
        if self._step:
            self._step.end()
        self._step = None
