"""Ctrl-C while a command is still being imported, or has already ended: the process goes at once and in silence.

The package imports this module first. In a program that is none of the commands it changes nothing.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def _is_command() -> bool:
    """Whether this process was started as mlx_qwen35.NAME, by its script or by python -m."""
    if sys.argv[:1] == ["-m"]:  # while the module is being found
        return any(word.removeprefix("-m").startswith("mlx_qwen35.") for word in sys.orig_argv)
    return Path(sys.argv[0] if sys.argv else "").name.startswith("mlx_qwen35.")


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


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
