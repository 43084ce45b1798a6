"""Where rows of training data come from: a file with a JSON object a line, or a program's list."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import without_duplicates
from mlx_qwen35.values import shown

LINE_BYTES = 256 << 20  # of one row; images that it holds as data: URIs are a part of it
_RULE = "a row must be a JSON object on a line of its own"
_BOM = b"\xef\xbb\xbf"


class Entry(NamedTuple):
    """One row as it was written. place: for `Source.read`. number: its line, from 1. done: bytes or rows behind it."""

    place: int
    number: int
    values: Mapping[str, Any]
    done: int


class Source(Protocol):
    """Rows that can be read in order, and one by one. total: bytes or rows in all."""

    total: int

    def __iter__(self) -> Iterator[Entry]: ...

    def read(self, place: int, number: int) -> Mapping[str, Any]:
        """The row at a place, once more."""

    def name(self, number: int) -> str:
        """How messages call a row."""


class LineFile:
    """A file with a JSON object a line. Empty lines are no rows."""

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            self.total = os.fstat(file.fileno()).st_size

    def __iter__(self) -> Iterator[Entry]:
        with self._open() as file:
            number = place = 0
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                if line.removeprefix(_BOM).strip():
                    yield Entry(place, number, self._parsed(line, number), place + len(line))
                place += len(line)

    def read(self, place: int, number: int) -> Mapping[str, Any]:
        with self._open() as file:
            file.seek(place)
            return self._parsed(file.readline(LINE_BYTES + 1), number)

    def name(self, number: int) -> str:
        return f"{self.path}, line {number}"

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            raise InputError("data_missing", f"{self.path} must be readable: {error.strerror}") from error

    def _parsed(self, line: bytes, number: int) -> Mapping[str, Any]:
        if len(line) > LINE_BYTES:
            raise self._refused(number, f"{_RULE}, of at most {LINE_BYTES:,} bytes")
        try:
            values = json.loads(
                line.removeprefix(_BOM if number == 1 else b"").decode(),
                object_pairs_hook=without_duplicates, parse_constant=_no_constant,
            )  # fmt: skip
        except RecursionError as error:
            raise self._refused(number, "objects and lists are nested too deep") from error
        except ValueError as error:
            raise self._refused(number, f"{_RULE}: {error}") from error
        if not isinstance(values, dict):
            raise self._refused(number, f"{_RULE}, got {shown(values)}")
        return values

    def _refused(self, number: int, rule: str) -> InputError:
        return InputError("data_invalid", f"{self.name(number)}: {rule}")


class Given:
    """Rows that a program gives, each like a line of a file. An image may also be a PIL image or an array."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows, self.total = rows, len(rows)

    def __iter__(self) -> Iterator[Entry]:
        for place in range(self.total):
            yield Entry(place, place + 1, self.read(place, place + 1), place + 1)

    def read(self, place: int, number: int) -> Mapping[str, Any]:
        row = self.rows[place]
        if not isinstance(row, Mapping):
            raise InputError("data_invalid", f"{self.name(number)}: a row must be a mapping, got {shown(row)}")
        return row

    def name(self, number: int) -> str:
        return f"row {number}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
