"""The parser of a command line. A wrong one is told in one line, with a code, as every other error is."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from mlx_qwen35 import __version__
from mlx_qwen35.console.interrupt import as_typed
from mlx_qwen35.console.notices import be_quiet
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import unknown_option


class Parser(argparse.ArgumentParser):
    """argparse's, with --version, --quiet and examples. In the place of an unknown option the nearest one is named.

    prog: the command's dotted name; shown is the name that was typed. stray: what to say of a word that belongs to no
    option. examples: what follows the command's name in command lines that work. quiet: the names of --quiet.
    """

    def __init__(
        self,
        *,
        prog: str,
        stray: str = "every value follows an option",
        examples: Sequence[str] = (),
        quiet: Sequence[str] = ("--quiet",),
        **options: Any,
    ):
        super().__init__(prog=as_typed(prog), allow_abbrev=False, **options)
        self._stray = stray
        self.examples = examples
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        self.add_argument(*quiet, action="store_true", help="write nothing but errors to standard error")

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The options of a command line, the process's by default. InputError for an unknown one."""
        found, left = self.parse_known_args(arguments)
        if unknown := [word.partition("=")[0] for word in left if word.startswith("-")]:
            raise unknown_option(unknown[0], self._option_string_actions)
        if left:
            raise InputError("option_unknown", f"{left[0]!r} belongs to no option: {self._stray}")
        be_quiet(found.quiet)
        return found

    def format_help(self) -> str:
        """argparse's, then the examples, each on a line as it is typed."""
        lines = "".join(f"  {self.prog} {example}".rstrip() + "\n" for example in self.examples)
        return super().format_help() + (f"\nexamples:\n{lines}" if lines else "")

    def error(self, message: str) -> NoReturn:
        raise InputError("option_invalid", f"{message}; {self.prog} --help lists the options")
