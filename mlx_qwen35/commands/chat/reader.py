"""Where the messages of a chat come from. On a terminal prompt.py has another one."""

from typing import Protocol

from mlx_qwen35.console.streams import MARK
from mlx_qwen35.errors import InputError


class Reader(Protocol):
    """What the user types."""

    def read(self, text: str = "") -> str | None:
        """The next message or command, which may have several lines; None at the end. text: to begin with, for /edit.

        Ctrl-C is no end: on a terminal it clears what was typed.
        """


class PlainReader:
    """Lines of standard input, without a prompt in the output."""

    def read(self, text: str = "") -> str | None:
        try:
            return input().removeprefix(MARK).strip()
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise InputError("text_unreadable", f"a line must be UTF-8 text: {error}") from error
        except OSError as error:
            raise InputError("text_unreadable", f"standard input must be readable: {error}") from error
