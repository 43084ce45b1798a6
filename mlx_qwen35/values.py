"""Checks of the values of options. Each raises InputError option_invalid, which names the option.

Numbers may be scalars of numpy and MLX; all become Python's own.
"""

import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError


def plain(value: Any) -> Any:
    """The Python value of a scalar of numpy or MLX; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_whole(value: Any) -> bool:
    """Whether this is a Python int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether this is a Python int or float, and no bool."""
    return is_whole(value) or isinstance(value, float)


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The integer in `value`, from `least` to `most`; None: unbounded."""
    found = plain(value)
    if is_whole(found) and least <= found and (most is None or found <= most):
        return int(found)
    span = f"at least {least}" if most is None else f"{least} to {most}"
    kind = "" if is_whole(found) else ", which is no whole number"
    raise InputError("option_invalid", f"{name} must be {span}, got {shown(value)}{kind}")


def number(name: str, value: Any, rule: str, least: float, most: float, above: bool = False) -> float:
    """The float in `value`, from `least` to `most`. above: excludes `least`. rule: the bounds in words."""
    found = plain(value)
    if is_number(found) and least <= found <= most and not (above and found == least):
        return float(found)
    raise InputError("option_invalid", f"{name} must be {rule}, got {shown(value)}")


def flag(name: str, value: Any) -> bool:
    found = plain(value)
    if not isinstance(found, bool):
        raise InputError("option_invalid", f"{name} must be True or False, got {shown(value)}")
    return found


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError("option_invalid", f"{name} must be text, got {shown(value)}")
    return value


def choice(name: str, value: Any, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise InputError("option_invalid", f"{name} must be one of {', '.join(known)}, got {shown(value)}")
    return value


def names(name: str, value: Any, what: str) -> tuple[str, ...]:
    """The names in a text, with commas between them, or in a list, each once. what: of what they are, with examples."""
    found = value.split(",") if isinstance(value, str) else value
    listed = isinstance(found, list | tuple) and all(isinstance(own, str) for own in found)
    kept = tuple(dict.fromkeys(own.strip() for own in found)) if listed else ()
    if not all(kept) or not kept:
        raise InputError("option_invalid", f"{name} must be names of {what}; got {shown(value)}")
    return kept


def path(name: str, value: Any) -> str:
    """The path in `value` as text."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise InputError("option_invalid", f"{name} must be a path, got {shown(value)}")
    return str(value)


def from_load(name: str, value: Any, kind: type) -> None:
    """InputError unless this is a model or a processor, as `kind` says."""
    if not isinstance(value, kind):
        raise InputError(
            "option_invalid",
            f"{name} must come from load(), which returns model and processor, in this order; got "
            f"{type(value).__name__}",
        )


def shown(value: Any) -> str:
    """Any value for a message: on one line, shortened."""
    return " ".join(_SHORT.repr(value).split())


class _Short(reprlib.Repr):
    """Shows an integer of thousands of digits, which Python refuses to print, as its size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxdict = 12

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 256 else f"an integer of {value.bit_length()} bits"

    def repr_array(self, value: Any, level: int) -> str:  # MLX's arrays have the name of Python's
        return self.repr_instance(value, level)


_SHORT = _Short()
