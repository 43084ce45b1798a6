"""Progress of long steps: bars on standard error, and what is told of a conversion that downloads its source."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from mlx_qwen35.console.notices import quiet
from mlx_qwen35.console.progress import SELDOM, Step
from mlx_qwen35.measure.layerwise import Progress

Told = Callable[[int, int, float | None], object]  # bytes done, all bytes, seconds left where that is known
CONVERTED = 50e6  # bytes a second that a conversion is taken to read before it was measured


def _interval() -> float:
    """Seconds between two states. In a file or another program every state is a line of its own."""
    return 0.1 if sys.stderr.isatty() else SELDOM


def bytes_bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=_interval(), disable=quiet())


@contextmanager
def percent(what: str, total: int) -> Iterator[Progress]:
    """A bar that shows the share of the work and the time left, for work whose unit tells nothing, such as products."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, desc=what, bar_format=form, mininterval=_interval(), disable=quiet()) as bar:
        yield bar.update


@contextmanager
def downloading(what: str) -> Iterator[Told]:
    """A line that shows how far it has come, with the time that is left."""
    with Step(what, "B") as step:
        yield step.told


class Bar:
    """What a bar takes, shown nowhere."""

    def update(self, nbytes: int) -> object: ...

    def set_description(self, what: str, refresh: bool = False) -> object: ...


class Course(Bar):
    """Download and conversion of a source as one step: the mean of how far both have come, and the time that is left
    by the rate of each.
    """

    def __init__(self, download: int, conversion: int, tell: Told):
        self._all = download, conversion
        self._done = [0, 0]
        self._measured: list[tuple[int, float]] = [(0, 0.0), (0, 0.0)]  # bytes and seconds of each
        self._tell = tell
        self.begin()

    def there(self, downloaded: int, converted: int) -> None:
        """What an earlier run has done."""
        self._done = [downloaded, converted]
        self._show()

    def begin(self) -> None:
        """From here on time is counted, for either of the two."""
        self._since = time.monotonic()

    def downloaded(self, nbytes: int) -> None:
        self._count(0, nbytes)

    def update(self, nbytes: int) -> None:
        self._count(1, nbytes)

    def _count(self, which: int, nbytes: int) -> None:
        before, self._since = self._since, time.monotonic()
        count, seconds = self._measured[which]
        self._measured[which] = count + nbytes, seconds + self._since - before
        self._done[which] += nbytes
        self._show()

    def _show(self) -> None:
        shares = [done / max(1, nbytes) for done, nbytes in zip(self._done, self._all, strict=True)]
        self._tell(int(self._all[0] * sum(shares) / 2), self._all[0], self._left())

    def _left(self) -> float | None:
        left = [nbytes - done for nbytes, done in zip(self._all, self._done, strict=True)]
        (received, waited), (converted, worked) = self._measured
        if left[0] and not received:
            return None
        per_byte = worked / converted if converted else 1 / CONVERTED
        return (left[0] * waited / received if left[0] else 0.0) + left[1] * per_byte
