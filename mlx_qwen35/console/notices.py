"""What a command tells on standard error beside its result: notices, warnings, progress and statistics. With --quiet it
tells nothing there but errors.

Whatever is written there goes through `tell`, or asks `quiet`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

STEPS: list[Callable[[], AbstractContextManager[None]]] = []  # that run: blocks in which their line is not shown
_quiet = False  # of the command that this process runs, in all its threads


def quiet() -> bool:
    """Whether --quiet was given."""
    return _quiet


def be_quiet(given: bool) -> None:
    """From here on --quiet counts as given, or not."""
    global _quiet
    _quiet = given
    if given:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # huggingface_hub reads it when it is imported


def tell(*lines: str) -> None:
    """Print lines on standard error, unless --quiet was given."""
    if lines and not _quiet:
        with on_lines_of_its_own():
            print(*lines, sep="\n", file=sys.stderr, flush=True)


@contextmanager
def on_lines_of_its_own() -> Iterator[None]:
    """The block writes to the terminal while no step has its line there."""
    with ExitStack() as stack:
        for hidden in tuple(STEPS):
            stack.enter_context(hidden())
        yield
