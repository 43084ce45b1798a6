"""Ctrl-C and errors while a command is still being imported; Ctrl-C also after its end: the process goes in silence.

The package imports this module first. In a program that is none of the commands it changes nothing.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def _command() -> str:
    """mlx_qwen35.NAME where this process was started as that, by its script or by python -m; otherwise ""."""
    words = sys.orig_argv if sys.argv[:1] == ["-m"] else sys.argv[:1]  # -m: while the module is being found
    names = (Path(word.removeprefix("-m")).name for word in words)
    return next((name for name in names if name.startswith("mlx_qwen35.")), "")


@contextmanager
def tell_errors() -> Iterator[None]:
    """An InputError in the block ends a command as one of its run does: in one line, with status 2."""
    try:
        yield
    except InputError as error:
        if not _command():
            raise
        print(f"{_command()}: error: {error} [{error.code}]", file=sys.stderr)
        raise SystemExit(2) from None


def _leave(*_: Any) -> None:
    os._exit(INTERRUPTED)


@contextmanager
def interruptible() -> Iterator[None]:
    """The block gets KeyboardInterrupt, as any program does."""
    ours = signal.getsignal(signal.SIGINT) is _leave
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _leave)


@contextmanager
def unwound_when_ended() -> Iterator[None]:
    """In the block a closed terminal (SIGHUP) or SIGTERM raises SystemExit in the main thread, so that what is open is
    saved.
    """

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)  # as shells have it

    before = {number: signal.signal(number, leave) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if _command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
