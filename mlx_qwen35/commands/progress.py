"""How far a long step has come, on standard error: on a terminal a line that is written over, elsewhere, where it goes
to a file or another program, a plain line every ten seconds. A step that is quickly done shows nothing."""

import sys
import threading
import time
from types import TracebackType
from typing import Self

SOON, OFTEN = 0.3, 0.1  # seconds until something is shown on a terminal, and from one state to the next
SELDOM = 10.0  # both, elsewhere


class Step:
    """A step that may take long. Called with how much is done, of how much in all, it shows that beside its name.

    unit: of what is counted; "B" for bytes. Where nothing is counted, the name is shown all the same.
    """

    def __init__(self, what: str, unit: str = ""):
        self._what, self._unit, self._state = what, unit, ""
        self._terminal = sys.stderr.isatty()
        self._timer = threading.Timer(SOON if self._terminal else SELDOM, self._begin)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._shown: float | None = None  # when a state was shown last; None while it is too early
        self._ended = False

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def __call__(self, done: int, total: int) -> None:
        self._tell(f": {_amounts(done, total, self._unit)}, {100 * done // total} %" if total else "")

    def say(self, what: str) -> None:
        """What it does now."""
        self._what = what
        self._tell("", new=True)

    def end(self) -> None:
        """Show nothing more. Ending twice is fine."""
        self._timer.cancel()
        with self._lock:
            self._clear()
            self._ended = True

    def clear(self) -> None:
        """Take its line off the terminal, for something else that is printed. The next state shows it again."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        if self._shown is not None and self._terminal and not self._ended:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _begin(self) -> None:
        with self._lock:
            self._show()

    def _tell(self, state: str, new: bool = False) -> None:
        with self._lock:
            self._state = state
            if self._shown is None:
                return
            since = time.monotonic() - self._shown
            if since >= (OFTEN if self._terminal else SELDOM) or (new and self._terminal):
                self._show()

    def _show(self) -> None:
        if self._ended:
            return
        self._shown = time.monotonic()
        before, after = ("\r\033[K", "") if self._terminal else ("", "\n")
        print(f"{before}{self._what}{self._state} ...", end=after, file=sys.stderr, flush=True)


def _amounts(done: int, total: int, unit: str) -> str:
    if unit != "B":
        return f"{done:,} of {total:,} {unit}".rstrip()
    size, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1.0, "B")) if total >= pair[0] or pair[0] == 1)
    return f"{done / size:.1f} of {total / size:.1f} {name}"
