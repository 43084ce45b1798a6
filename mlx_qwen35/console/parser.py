"""The parser of a command line. A wrong one is told in one line, with a code, as every other error is."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from mlx_qwen35 import __version__
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import unknown_option


class Parser(argparse.ArgumentParser):
    """argparse's, with --version, and with the nearest option named in the place of an unknown one.

    stray: what to say of a word that belongs to no option.
    """

    def __init__(self, *, stray: str = "every value follows an option", **options: Any):
        super().__init__(**options)
        self._stray = stray
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The options of a command line, the process's by default. InputError for an unknown one."""
        found, left = self.parse_known_args(arguments)
        if unknown := [word.partition("=")[0] for word in left if word.startswith("-")]:
            raise unknown_option(unknown[0], self._option_string_actions)
        if left:
            raise InputError("option_unknown", f"{left[0]!r} belongs to no option: {self._stray}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the options [option_invalid]\n")
