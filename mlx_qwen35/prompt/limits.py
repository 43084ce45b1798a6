"""The time and memory that a chat template may use: counted as it runs, estimated before it builds something large."""

import math
import re
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError

_SECONDS = 10  # a backstop: steps run out first unless each is slow
_NESTING = 100  # lists in each other
_INTEGER = 100_000  # largest whole number as an argument: most say a width or a count
_BITS = 10_000  # longest whole number that comes out of anything
_PARAMETERS = {"replace": ("old", "new", "count"), "join": ("d", "attribute")}


class Exceeded(TemplateError):
    """A template went beyond its bounds."""


class RenderLimits:
    """The steps, characters and seconds that one rendering has left.

    Args:
        values, chars: how many values the messages and tools are, and how many characters they hold. More of them may
            take longer.
    """

    def __init__(self, values: int, chars: int):
        self._steps = self._most_steps = 100_000 + 1000 * values
        self._chars = self._most_chars = 1_000_000 + 32 * chars
        self._deadline = time.monotonic() + _SECONDS
        self.depth = 0

    def step(self, count: int = 1) -> None:
        self._steps -= count
        if self._steps < 0:
            raise Exceeded(f"it takes more than {self._most_steps:,} steps for them")
        if time.monotonic() > self._deadline:
            raise Exceeded(f"it takes more than {_SECONDS} seconds for them")

    def check(self, chars: float) -> None:
        """Refuse to build a text or list of so many characters."""
        if chars > self._most_chars:
            raise Exceeded(f"it builds a text or list of more than {self._most_chars:,} characters from them")

    def take(self, value: Any) -> Any:
        """Count one step and its result."""
        self.step()
        if isinstance(value, str):
            self._chars -= len(value)
            if self._chars < 0:
                raise Exceeded(f"it builds texts of more than {self._most_chars:,} characters from them")
        elif isinstance(value, list | tuple | dict):
            self.size(value)
        elif isinstance(value, int) and value.bit_length() > _BITS:
            raise Exceeded(f"it computes a number of more than {_BITS:,} bits")
        return value

    def size(self, value: Any) -> int:
        """About how many characters a value would be, written out. Lists of lists of the same list are long."""
        visited, total = 0, 0
        waiting = [(value, 0)]
        while waiting:
            item, depth = waiting.pop()
            visited += 1
            if visited % 64 == 0:
                self.step(64)
            total += _length(item)
            self.check(total)
            if depth > _NESTING:
                raise Exceeded(f"it nests lists more than {_NESTING} deep")
            if isinstance(item, Mapping):
                waiting += [(inner, depth + 1) for pair in item.items() for inner in pair]
            elif isinstance(item, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
                waiting += [(inner, depth + 1) for inner in item]
        return total


def _length(value: Any) -> int:
    if isinstance(value, str | bytes):
        return 1 + len(value)
    return 1 + value.bit_length() // 3 if isinstance(value, int) else 1


def estimated(limits: RenderLimits, name: str, value: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """The arguments of a method or filter. Refuses a call whose result would be too long."""
    given = (*args, *kwargs.values())
    if name not in ("default", "d") and any(isinstance(one, int) and abs(one) > _INTEGER for one in given):
        raise Exceeded(f"it gives {name} a number beyond {_INTEGER:,}")
    named = dict(zip(_PARAMETERS.get(name, ()), args, strict=False)) | dict(kwargs)
    if name == "join":
        return _join_arguments(limits, value, args, named.get("d", ""))
    if name == "replace" and {"old", "new"} <= set(named):
        whole = str(value)  # a filter takes a list for its text
        found = whole.count(str(named["old"])) if named["old"] else len(whole) + 1
        limits.check(len(whole) + limits.size(named["new"]) * found)
    elif name in ("format", "format_map"):
        _check_format(limits, str(value), given)
    elif name in ("indent", "expandtabs"):
        width = max((one if isinstance(one, int) else limits.size(one) for one in given), default=8)
        whole = str(value)
        limits.check(len(whole) + width * (1 + len(whole.splitlines()) + whole.count("\t")))
    elif name == "sum" and any(not isinstance(one, int | float | str | None) for one in given):
        raise SecurityError("sum adds numbers alone")
    return args


def _join_arguments(limits: RenderLimits, value: Any, args: tuple, separator: Any) -> tuple:
    """The arguments of separator.join(items), or of items|join(separator), whose items are a list."""
    if isinstance(value, list):
        limits.check(limits.size(value) + limits.size(separator) * len(value))
        return args
    items = [*args[0]] if args else []
    limits.check(limits.size(items) + len(value) * len(items))
    return (items, *args[1:])


def _check_format(limits: RenderLimits, pattern: str, given: Any) -> None:
    # Digits of any script make a width, and zeros before it count for nothing.
    width = max((int(digits) if len(digits) < 10 else math.inf for digits in re.findall(r"\d+", pattern)), default=0)
    computed = re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*\{", pattern.replace("{{", ""))
    if width > _INTEGER or computed:
        raise Exceeded(f"it formats to a width beyond {_INTEGER:,}, or one that it computes")
    fields = pattern.count("%") + pattern.count("{")
    limits.check(len(pattern) + fields * (10 * limits.size(given) + width))


def check_operands(limits: RenderLimits, sign: str, left: Any, right: Any) -> None:
    numbers = isinstance(left, int) and isinstance(right, int)
    if numbers and sign in ("*", "**"):
        bits = left.bit_length() * right if sign == "**" else left.bit_length() + right.bit_length()
        if abs(left) > 1 and bits > _BITS:
            raise Exceeded(f"it computes a number of more than {_BITS:,} bits")
    elif sign == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(times, int):
                limits.check(limits.size(one) * max(times, 0))
    elif sign == "%" and isinstance(left, str):
        _check_format(limits, left, right)
    elif sign == "+" and not numbers:
        limits.check(limits.size(left) + limits.size(right))
