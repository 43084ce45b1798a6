"""What a chat template may use of time and memory: counted as it runs, estimated before it builds something large."""

import math
import re
import time
from collections.abc import Mapping, MappingView
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError

_SECONDS = 10  # a backstop: steps run out first unless each is slow
_NESTING = 100  # lists in each other
_INTEGER = 100_000  # largest whole number as an argument: most say a width or a count
_BITS = 10_000  # longest whole number that comes out of anything
_PARAMETERS = {"replace": ("old", "new", "count"), "join": ("d", "attribute")}


class Exceeded(TemplateError):
    """A template went beyond its bounds."""


class Budget:
    """What one rendering may still use.

    Args:
        values, chars: how many values the messages and tools are, and how many characters they hold; the more there is
            to render, the longer it may take.
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
        """Refuse to build what is so long."""
        if chars > self._most_chars:
            raise Exceeded(f"it builds a text or list of more than {self._most_chars:,} characters from them")

    def take(self, value: Any) -> Any:
        """Count one step and what it made."""
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
            elif isinstance(item, list | tuple | set | frozenset | MappingView):
                waiting += [(inner, depth + 1) for inner in item]
        return total


def _length(value: Any) -> int:
    if isinstance(value, str | bytes):
        return 1 + len(value)
    return 1 + value.bit_length() // 3 if isinstance(value, int) else 1


def estimated(budget: Budget, name: str, value: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """The arguments of a method or filter, where its result is not too long."""
    given = (*args, *kwargs.values())
    if name not in ("default", "d") and any(isinstance(one, int) and abs(one) > _INTEGER for one in given):
        raise Exceeded(f"it gives {name} a number beyond {_INTEGER:,}")
    named = dict(zip(_PARAMETERS.get(name, ()), args, strict=False)) | dict(kwargs)
    if name == "join":
        return _join_arguments(budget, value, args, named.get("d", ""))
    if name == "replace" and {"old", "new"} <= set(named):
        whole = str(value)  # a filter takes a list for its text
        found = whole.count(str(named["old"])) if named["old"] else len(whole) + 1
        budget.check(len(whole) + budget.size(named["new"]) * found)
    elif name in ("format", "format_map"):
        _check_format(budget, str(value), given)
    elif name in ("indent", "expandtabs"):
        width = max((one if isinstance(one, int) else budget.size(one) for one in given), default=8)
        whole = str(value)
        budget.check(len(whole) + width * (1 + len(whole.splitlines()) + whole.count("\t")))
    elif name == "sum" and any(not isinstance(one, int | float | str | None) for one in given):
        raise SecurityError("sum adds numbers alone")
    return args


def _join_arguments(budget: Budget, value: Any, args: tuple, separator: Any) -> tuple:
    """Of separator.join(items), and of items|join(separator): a filter is given its items in a list."""
    if isinstance(value, list):
        budget.check(budget.size(value) + budget.size(separator) * len(value))
        return args
    items = [*args[0]] if args else []
    budget.check(budget.size(items) + len(value) * len(items))
    return (items, *args[1:])


def _check_format(budget: Budget, pattern: str, given: Any) -> None:
    # Digits of any script make a width, and zeros before it count for nothing.
    width = max((int(digits) if len(digits) < 10 else math.inf for digits in re.findall(r"\d+", pattern)), default=0)
    computed = re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*\{", pattern.replace("{{", ""))
    if width > _INTEGER or computed:
        raise Exceeded(f"it formats to a width beyond {_INTEGER:,}, or one that it computes")
    fields = pattern.count("%") + pattern.count("{")
    budget.check(len(pattern) + fields * (10 * budget.size(given) + width))


def check_operands(budget: Budget, sign: str, left: Any, right: Any) -> None:
    numbers = isinstance(left, int) and isinstance(right, int)
    if numbers and sign in ("*", "**"):
        bits = left.bit_length() * right if sign == "**" else left.bit_length() + right.bit_length()
        if abs(left) > 1 and bits > _BITS:
            raise Exceeded(f"it computes a number of more than {_BITS:,} bits")
    elif sign == "*":
        for one, times in ((left, right), (right, left)):
            if isinstance(times, int):
                budget.check(budget.size(one) * max(times, 0))
    elif sign == "%" and isinstance(left, str):
        _check_format(budget, left, right)
    elif sign == "+" and not numbers:
        budget.check(budget.size(left) + budget.size(right))
