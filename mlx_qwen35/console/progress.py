"""How far a long step has come, on standard error: on a terminal a line that is written over, with a spinner;
elsewhere, where it goes to a file or another program, a plain line every ten seconds. A step that is quickly done, or
with --quiet, shows nothing.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from mlx_qwen35.console.notices import STEPS, quiet

SOON, OFTEN = 0.3, 0.1  # seconds until something is shown on a terminal, and from one state to the next
SELDOM = 10.0  # both, elsewhere
TURN = 0.1  # seconds from one picture of the spinner to the next
SPINNER, PLAIN_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\"
MEASURED = 3.0  # seconds that a step must have been measured for before it says how long it still takes


class Step:
    """A step that may take long. Called with how much is done, of how much in all, it shows that beside its name.

    unit: of what is counted; "B" for bytes. Where nothing is counted, the name is shown all the same. timed: whether
    the time left is shown; see `seconds_left`.
    """

    def __init__(self, what: str, unit: str = "", timed: bool = False):
        self._what, self._unit = _on_one_line(what), unit
        self._state: list[str] = []  # how far it has come: what can be left out of a narrow line first
        self._timed = timed
        self._marks: list[tuple[int, float]] = []  # how much was done when; empty where it is not timed
        self._terminal = sys.stderr.isatty()
        self._turns = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._lock = threading.RLock()
        self._shown: float | None = None  # when a state was shown last; None while it is too early
        self._changed = True  # since it was shown
        self._ended = False

    def __enter__(self) -> Self:
        STEPS.append(self._hidden)
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C: it may have started
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def __call__(self, done: int, total: int) -> None:
        if self._timed:
            if self._marks and done <= self._marks[-1][0]:  # it begins anew
                self._marks = []
            self._marks.append((done, time.monotonic()))
        self.told(done, total, seconds_left(self._marks, total) if self._timed else None)

    def told(self, done: int, total: int, left: float | None, what: str | None = None) -> None:
        """Like a call, of a step that tells itself how many seconds are left. what: its name from now on."""
        self._what = self._what if what is None else _on_one_line(what)
        time_left = f", {duration(left)} left" if left else ""
        self._tell([_amounts(done, total, self._unit), f"{100 * done // total} %{time_left}"] if total else [])

    def images(self, done: int, total: int) -> None:
        """So many of a prompt's images are encoded, which comes before its prefill."""
        self._tell([_amounts(done, total, "images"), f"{100 * done // total} %"])

    def say(self, what: str) -> None:
        """What it does now, which is not timed."""
        self._what, self._timed = _on_one_line(what), False
        self._tell([], new=True)

    def waits(self, whom: str) -> None:
        """It waits for somebody else."""
        self.say(f"waiting for {whom}")

    def end(self) -> None:
        """Show nothing more. Ending twice is fine."""
        self._end.set()
        with self._lock:
            self._clear()
            self._ended = True
        if self._hidden in STEPS:
            STEPS.remove(self._hidden)

    def clear(self) -> None:
        """Take its line off the terminal, for something else that is printed. The next state shows it again."""
        with self._lock:
            self._clear()

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        with self._lock:
            self._clear()
            yield

    def _clear(self) -> None:
        if self._shown is not None and self._terminal and not self._ended:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _run(self) -> None:
        """Show it for the first time, and turn the spinner, until the end; elsewhere show what has changed since."""
        wait = SOON if self._terminal else SELDOM
        while not self._end.wait(wait):
            with self._lock:
                if self._terminal or self._changed:
                    self._show()
                self._turns += 1
            wait = TURN if self._terminal else max(SELDOM, TURN)

    def _tell(self, state: list[str], new: bool = False) -> None:
        with self._lock:
            self._state, self._changed = state, True
            if self._shown is None:
                return
            since = time.monotonic() - self._shown
            if since >= (OFTEN if self._terminal else SELDOM) or (new and self._terminal):
                self._show()

    def _show(self) -> None:
        if self._ended or quiet():
            return
        self._shown, self._changed = time.monotonic(), False
        if self._terminal:
            print(f"\r\033[K{self._line()}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{_joined(self._what, self._state)} ...", file=sys.stderr, flush=True)

    def _line(self) -> str:
        """What fits into one line of the terminal."""
        pictures = SPINNER if "utf" in (sys.stderr.encoding or "utf").lower() else PLAIN_SPINNER
        width = _columns() - 3
        line = _joined(self._what, self._state)
        if len(line) > width:
            line = _joined(self._what, self._state[1:])
        if len(line) > width:
            kept = max(8, width - 1 - (len(line) - len(self._what)))
            line = _joined(f"{self._what[:kept]}…", self._state[1:])[:width]
        return f"{pictures[self._turns % len(pictures)]} {line}"


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _joined(what: str, state: Sequence[str]) -> str:
    return ": ".join([what, *([", ".join(state)] if state else [])])


def _columns() -> int:
    """Of the terminal that standard error is."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def seconds_left(marks: Sequence[tuple[int, float]], total: int) -> float | None:
    """How long a prefill still takes; None until there are five marks within at least MEASURED seconds.

    A token takes a constant and, in the attention layers, a time in proportion to the tokens before it: a line over its
    position. The line goes through the mean seconds of a token in the earlier and in the later half of the marks. So a
    machine that has become slower or faster counts by the later half, and a first chunk that took longer not at all.

    marks: the tokens that were done, ascending, and the time in seconds at which they were. total: of all tokens.
    """
    (first, began), (middle, then), (done, now) = marks[0], marks[len(marks) // 2], marks[-1]
    if len(marks) < 5 or now - began < MEASURED:
        return None
    early, late = (then - began) / (middle - first), (now - then) / (done - middle)
    slope = max(0.0, late - early) / ((done - first) / 2)  # between the middles of the two halves
    return (total - done) * (late + slope * (total - middle) / 2)  # from the later middle to that of what is left


def duration(seconds: float) -> str:
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if size == 3600 else 0}f} {name}"
    return f"{max(1, round(seconds))} s"


def _amounts(done: int, total: int, unit: str) -> str:
    if unit != "B":
        return f"{done:,} of {total:,} {unit}".rstrip()
    size, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1.0, "B")) if total >= pair[0] or pair[0] == 1)
    return f"{done / size:.1f} of {total / size:.1f} {name}"
