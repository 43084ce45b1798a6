"""The option --json of every command: what was found as JSON, on standard output or in a file.

`--json` prints it in the place of the text; `--json FILE` writes it to the file and leaves the text as it is.
"""

import json
import os
from pathlib import Path
from typing import Any, Protocol

from mlx_qwen35.console.streams import write_file
from mlx_qwen35.errors import InputError

STDOUT = Path("-")  # the value of --json without a file


class _Accepts(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *flags: str, **settings: Any) -> Any: ...


def meaning(what: str) -> str:
    return f"print {what} as JSON in the place of the text, or with FILE write it there too"


def add_json(accepts: _Accepts, what: str = "the result") -> None:
    """The option. what: what the JSON holds, for --help."""
    accepts.add_argument(
        "--json", nargs="?", type=Path, const=STDOUT, metavar="FILE",
        help=meaning(what),
    )  # fmt: skip


def check_json(file: Path | None) -> None:
    """Refuse a file that could not be written, before anything is measured."""
    if file is None or file == STDOUT:
        return
    folder = file.expanduser().absolute().parent
    if file.expanduser().is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            "output_unwritable", f"--json must name a file in a folder that exists and can be written, got {file}"
        )


def write_json(file: Path | None, value: Any, in_a_line: bool = False) -> bool:
    """Print or write `value`, as `file`, the value of --json, says; True where it stands in the place of the text."""
    if file is None:
        return False
    text = json.dumps(value, indent=None if in_a_line else 2, ensure_ascii=False, default=list)  # bytes as numbers
    if file == STDOUT:
        print(text, flush=True)
        return True
    write_file(file.expanduser(), text + "\n")
    return False
