"""Bars on standard error for what takes more than a moment."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Told = Callable[[int], object]  # how much has been done since the last time


def silent(done: int) -> None:
    """For work that shows none."""


def bytes_bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True)


@contextmanager
def percent(what: str, total: int) -> Iterator[Told]:
    """Work whose amount tells nobody anything, such as products: its share is shown, and the time left."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, desc=what, bar_format=form) as bar:
        yield bar.update
