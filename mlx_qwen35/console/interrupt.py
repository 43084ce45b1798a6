"""Ctrl-C and errors while a command is still being imported; Ctrl-C also after its end: the process goes in silence.

The package imports this module first. In a program that is none of the commands it changes nothing.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
_ENDING = (signal.SIGHUP, signal.SIGTERM)


def started_as(argv: Sequence[str], original: Sequence[str]) -> str:
    """The command of these words, by its script or by python -m: "mlx_qwen35.chat", "mlx_qwen35 chat", "mlx_qwen35";
    otherwise "". original: the words with the interpreter's options, which name the module while it is being found.
    """
    if not argv:
        return ""
    program = original[-len(argv)].removeprefix("-m") if argv[0] == "-m" else Path(argv[0]).name
    if program != PACKAGE:
        return program if program.startswith(f"{PACKAGE}.") else ""
    return " ".join([program, *(word for word in argv[1:2] if not word.startswith("-"))])


PACKAGE = "mlx_qwen35"
STARTED_AS = started_as(sys.argv, sys.orig_argv)
IS_UMBRELLA = STARTED_AS.split(" ")[0] == PACKAGE  # the command mlx_qwen35, which has all the others


def as_typed(command: str) -> str:
    """The dotted name of a command as it is typed in this process: "mlx_qwen35 chat" where that is how it started."""
    return command.replace(".", " ", 1) if IS_UMBRELLA else command


@contextmanager
def tell_errors() -> Iterator[None]:
    """An InputError in the block ends a command as one of its run does: in one line, with status 2."""
    try:
        yield
    except InputError as error:
        if not STARTED_AS:
            raise
        print(f"{STARTED_AS}: error: {error} [{error.code}]", file=sys.stderr)
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
    saved. From then on no signal ends the block earlier. One that is ignored, as nohup has it, stays ignored.
    """

    def leave(number: int, _: Any) -> None:
        for other in (*_ENDING, signal.SIGINT):
            signal.signal(other, _stay)
        sys.exit(128 + number)  # as shells have it

    with _restored():
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, leave)
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """The block, which saves what is open, is ended by none of SIGHUP, SIGTERM and Ctrl-C."""
    with _restored():
        for number in (*_ENDING, signal.SIGINT):
            signal.signal(number, _stay)
        yield


def _stay(*_: Any) -> None:
    """Not SIG_IGN: Python complains of a signal that came before it was ignored and is handled behind that."""


@contextmanager
def _restored() -> Iterator[None]:
    """The handlers of signals are as before behind the block."""
    before = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if STARTED_AS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
