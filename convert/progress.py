"""Progress bars of long steps, on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from mlx_qwen35.console.notices import quiet
from mlx_qwen35.console.progress import SELDOM
from mlx_qwen35.measure.layerwise import Progress


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
