"""The standard streams of a command, some of which may be closed, full, or without a reader."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

MARK = "\ufeff"  # with which editors begin a UTF-8 file; no part of its text


class OutputError(Exception):
    """Standard output cannot be written; str() says why."""


class _Output:
    """A stream whose errors are told apart from those of files. One that lost its reader raises BrokenPipeError."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with _told():
            return self._stream.write(text)

    def flush(self) -> None:
        with _told():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output must be writable: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise OutputError(f"standard output must be UTF-8 (PYTHONUTF8=1 makes it so): {error}") from error


@contextmanager
def standard_streams() -> Iterator[None]:
    """The block writes to standard output with OutputError where that fails; nothing is left unwritten behind it.

    A closed stream is replaced where it can be: else the next file that is opened would take its place, print() write
    to standard output instead of standard error, and MLX, which reads no file in the place of standard input, fail.
    """
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
    if sys.stdout is None:
        os.open(os.devnull, os.O_WRONLY)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (stays open)
    if sys.stdout is None:
        raise OutputError("standard output must be open; it is closed")
    with redirect_stdout(_Output(sys.stdout)):
        try:
            yield
        finally:
            sys.stdout.flush()


def give_up_output() -> None:
    """Let what is still unwritten go nowhere, so that the interpreter does not complain of it at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def standard_input() -> TextIO:
    """InputError where it is closed."""
    if sys.stdin is None:
        raise InputError("text_unreadable", "standard input must be open; it is closed")
    return sys.stdin


def read_input() -> str:
    """All of standard input, without a mark at its beginning."""
    try:
        return standard_input().read().removeprefix(MARK)
    except (OSError, ValueError) as error:
        raise InputError("text_unreadable", f"standard input must be UTF-8 text: {error}") from error


def read_file(option: str, file: Path) -> str:
    """The text of a file that an option names, without a mark at its beginning."""
    try:
        return file.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, ValueError) as error:  # what cannot be read, a home that is none, other bytes
        raise InputError(
            "text_unreadable", f"{option} must be a readable UTF-8 text file; {shown(str(file))} is not: {error}"
        ) from error


def write_file(file: Path, text: str) -> None:
    """Write what a command has found."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError("output_unwritable", f"{file} must be a file that can be written: {error}") from error
