"""Where the messages of a chat come from. On a terminal prompt.py has another one."""

import sys
from typing import Protocol

from mlx_qwen35.console.streams import MARK
from mlx_qwen35.errors import InputError

QUOTES = '"""'  # around a message of several lines


class Unreadable(InputError):
    """Standard input cannot be read any more."""


class Reader(Protocol):
    """What the user types."""

    def read(self, text: str = "", attached: str = "") -> str | None:
        """The next message or command, which may have several lines; None at the end.

        text: to begin with, for /edit. attached: what goes with the message, to show. Ctrl-C is no end: on a terminal
        it clears what was typed, and where a text was given it is an empty line.
        """


class PlainReader:
    """Lines of standard input, each a message. prompt: written to standard error, for a terminal without a cursor."""

    def __init__(self, prompt: str = ""):
        self._prompt = prompt

    def read(self, text: str = "", attached: str = "") -> str | None:
        line = self._line(self._prompt)
        while line is not None and block_open(line):
            more = self._line("... " if self._prompt else "")
            if more is None:
                raise InputError("text_unreadable", f"a message that begins with {QUOTES} must end with {QUOTES}")
            line += f"\n{more}"
        return None if line is None else unblocked(line.strip())

    def _line(self, prompt: str) -> str | None:
        print(prompt, end="", file=sys.stderr, flush=True)
        try:
            return input().removeprefix(MARK)
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise InputError("text_unreadable", f"a line must be UTF-8 text: {error}") from error
        except OSError as error:
            raise Unreadable("text_unreadable", f"standard input must be readable: {error}") from error


def block_open(text: str) -> bool:
    """Whether a text begins with three quotes that are not closed yet."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) % 2 == 1


def unblocked(text: str) -> str:
    """A message without the three quotes around it, if it has them. What they hold is never a command."""
    if not (text.startswith(QUOTES) and text.endswith(QUOTES) and text.count(QUOTES) == 2):
        return text
    inner = text.removeprefix(QUOTES).removesuffix(QUOTES).strip()
    return f"/{inner}" if inner.startswith("/") else inner
