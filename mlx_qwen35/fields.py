"""JSON files of a checkpoint, and their fields, each of its type and within bounds.

The files come from strangers. A reader returns a value that can be computed with, or raises an InputError that names
file and field. Sizes are bounded before anything is counted or filled by them.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import is_number, is_whole, shown

JSON_BYTES = 8 << 20  # of a settings file or an index; published ones have up to 200 KB
WIDTH = 1 << 24  # of any axis of a tensor
_DEPTH = 64  # objects and lists within each other
_DIGITS = 300  # of a whole number; one more than 308 is no float


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes; InputError for anything else. A byte order mark is skipped.

    Python's NaN and Infinity pass, for fields that nobody reads; Fields refuses them.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError("json_invalid", f"{path} must have at most {most:,} bytes; it has more")
    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=without_duplicates, parse_int=_whole)
        _check_depth([values])
    except RecursionError as error:
        raise InputError("json_invalid", f"{path} must not nest objects and lists deeper than {_DEPTH}") from error
    except ValueError as error:
        raise InputError("json_invalid", f"{path} must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError("json_invalid", f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a name stands twice."""
    values = dict(pairs)
    if len(values) < len(pairs):  # programs differ in the one that they use
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object names {shown(twice)} twice")
    return values


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _check_depth(level: list[Any]) -> None:
    """RecursionError for values that nest so deep that copying or writing them might fail."""
    for _ in range(_DEPTH + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    raise RecursionError


class Fields:
    """The typed fields of one JSON object. Every InputError names the field, the object (`where`) and the rule."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def has(self, name: str) -> bool:
        """Whether the field is there; null counts as absent."""
        return self.values.get(name) is not None

    def get(self, name: str, kind: type) -> Any:
        if not self.has(name):
            raise InputError("config_field_missing", f"{self.where} must hold {name!r}: no default would be right")
        return self.check(name, self.values[name], kind)

    def check(self, name: str, value: Any, kind: type) -> Any:
        fits = is_number(value) if kind is float else is_whole(value) if kind is int else isinstance(value, kind)
        if not fits:
            raise self.invalid(name, f"of type {kind.__name__}", value)
        return value

    def invalid(self, name: str, rule: str, value: Any) -> InputError:
        """The error for a field that must be as the rule says."""
        return InputError("config_field_invalid", f"{self.where}: {name!r} must be {rule}, got {shown(value)}")

    def object(self, name: str) -> Mapping[str, Any] | None:
        """A JSON object, None where it is absent."""
        if not self.has(name):
            return None
        if not isinstance(self.values[name], dict):
            raise self.invalid(name, "an object", self.values[name])
        return self.values[name]

    def whole(self, name: str, least: int, most: int, absent: int | None = None) -> int:
        """An integer. absent: the value of an absent field; None: the field must be there."""
        if absent is not None and not self.has(name):
            return absent
        return int(self._within(name, self.get(name, int), least, most))

    def size(self, name: str, most: int = WIDTH) -> int:
        return self.whole(name, 1, most)

    def number(self, name: str, least: float, most: float, absent: float | None = None) -> float:
        """A finite number. absent: as in `whole`."""
        if absent is not None and not self.has(name):
            return absent
        return self._within(name, float(self.get(name, float)), least, most)

    def numbers(self, name: str, count: int, least: float, most: float) -> list[float]:
        """A list of `count` finite numbers."""
        values = self.get(name, list)
        if len(values) != count:
            raise self.invalid(name, f"{count} numbers", values)
        return [self._within(name, float(self.check(name, value, float)), least, most) for value in values]

    def _within(self, name: str, value: float, least: float, most: float) -> float:
        if not least <= value <= most:  # NaN is neither
            raise self.invalid(name, f"a number from {least:,} to {most:,}", value)
        return value

    def only(self, name: str, *supported: Any, required: bool = True) -> None:
        """Refuse values of a field other than those supported: it changes the computation."""
        if not required and not self.has(name):
            return
        value = self.get(name, type(supported[0]))
        if value not in supported:
            known = " or ".join(map(repr, supported))
            raise InputError("config_field_unsupported", f"{self.where}: {name!r} is {shown(value)}, not {known}")
