"""The rotary embedding's fields of config.json, under rope_parameters and under the older names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import Fields
from mlx_qwen35.values import is_whole, shown

OLDER = ("rope_scaling", "rope_theta", "partial_rotary_factor")  # of transformers before 5


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the gated-attention layers (interleaved M-RoPE over three position axes)."""

    theta: float
    dims: int  # rotated dims of each head, the first ones
    sections: tuple[int, int, int]  # how many of the dims / 2 frequencies follow the T, H and W axis


def rope_parameters(text: Fields) -> dict[str, Any]:
    """The entries of rope_parameters, which may also be in rope_scaling or be fields by themselves.

    transformers 5.23 reads all three. InputError where two of them differ, for programs differ in the one they use.
    """
    older = {name: text.values[name] for name in OLDER if text.has(name)}
    if not older:
        return _entries(text.get("rope_parameters", dict), f"{text.where}.rope_parameters")
    found: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        _join(found, _entries(text.object(name) or {}, f"{text.where}.{name}"), text.where)
    older.pop("rope_scaling", None)
    _join(found, older, text.where)
    return found if text.has("rope_parameters") else {"rope_type": "default"} | found


def _entries(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries that are not null, with mlx-lm's `type` renamed to rope_type. InputError for scaled positions."""
    entries = {name: value for name, value in values.items() if value is not None}
    for kind in (entries.pop("type", None), entries.get("rope_type")):
        if kind is not None:
            Fields({"rope_type": kind}, where).only("rope_type", "default")
            entries["rope_type"] = kind
    return entries


def _join(found: dict[str, Any], more: Mapping[str, Any], where: str) -> None:
    for name, value in more.items():
        if found.setdefault(name, value) != value:
            raise InputError(
                "config_field_invalid",
                f"{where} must say the same of {name!r} in rope_parameters and in the older fields "
                f"({', '.join(OLDER)}); it says {shown(found[name])} and {shown(value)}. Take the wrong one out",
            )


def read_rope(text: Fields, head_dim: int) -> RopeConfig:
    """The rotary embedding. InputError for a field that is absent, out of bounds, or asks for another embedding."""
    rope = Fields(rope_parameters(text), f"{text.where}.rope_parameters")
    rope.only("rope_type", "default")
    rope.only("mrope_interleaved", True, required=False)
    dims = int(head_dim * rope.number("partial_rotary_factor", 0, 1))
    sections = tuple(rope.get("mrope_section", list))
    if len(sections) != 3 or not all(is_whole(s) and s >= 0 for s in sections) or 2 * sum(sections) != dims:
        rule = f"three counts that add up to half of the rotated dims ({dims} of head_dim {head_dim})"
        raise rope.invalid("mrope_section", rule, list(sections))
    if not dims or any(axis + 3 * (sections[axis] - 1) >= dims // 2 for axis in (1, 2)):
        raise rope.invalid("mrope_section", f"counts that interleave within {dims // 2} pairs", list(sections))
    return RopeConfig(rope.number("rope_theta", 1, 1e30), dims, sections)
