"""The rotary embedding's fields of config.json, under rope_parameters and under the older names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import Fields
from mlx_qwen35.options import spelled
from mlx_qwen35.values import is_whole, shown

# transformers before 5 has the first three beside rope_parameters; the last is read there to this day.
OLDER = ("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
TYPES = ("default", "yarn")
TRAINED = 262_144  # positions, at most: no checkpoint of the family was trained on more
FACTOR, MOST_FACTOR = 4.0, 64.0  # of YaRN; 64 x 262,144 is 2^24, up to which float32 holds every position
_POSITIONS = 2**31 - 1  # they are int32
_YARN = (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
    "mscale_all_dim", "truncate",
)  # fmt: skip


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071), with the names and defaults of transformers: frequencies for a longer context.

    factor: the longer context, in lengths of the original one. original: the length that the ramp between turned and
    slowed frequencies is computed from. beta_fast, beta_slow: turns within that length, where the ramp begins and ends;
    with `truncate` at whole frequencies. attention_factor: of cosines and sines.
    """

    factor: float
    original: int
    attention_factor: float
    beta_fast: float = 32
    beta_slow: float = 1
    truncate: bool = True


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the gated-attention layers (interleaved M-RoPE over three position axes)."""

    theta: float
    dims: int  # rotated dims of each head, the first ones
    sections: tuple[int, int, int]  # how many of the dims / 2 frequencies follow the T, H and W axis
    yarn: Yarn | None = None


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
    """The entries that are not null, with mlx-lm's `type` renamed to rope_type. InputError for a type not of TYPES.

    A `truncate` of null is false, as transformers 5.23 takes it.
    """
    entries = {name: value for name, value in values.items() if value is not None}
    if "truncate" in values:
        entries.setdefault("truncate", False)
    for kind in (entries.pop("type", None), entries.get("rope_type")):
        if kind is not None:
            Fields({"rope_type": kind}, where).only("rope_type", *TYPES)
            _join(entries, {"rope_type": kind}, where)
    return entries


def _join(found: dict[str, Any], more: Mapping[str, Any], where: str) -> None:
    for name, value in more.items():
        if found.setdefault(name, value) != value:
            raise InputError(
                "config_field_invalid",
                f"{where} must say the same of {name!r} in rope_parameters and in the fields beside it "
                f"({', '.join(OLDER)}), type being rope_type; it says {shown(found[name])} and {shown(value)}. Take "
                "the wrong one out",
            )


def read_rope(text: Fields, head_dim: int) -> RopeConfig:
    """The rotary embedding. InputError for a field that is absent, out of bounds, or asks for another embedding."""
    rope = Fields(rope_parameters(text), f"{text.where}.rope_parameters")
    rope.only("rope_type", *TYPES)
    rope.only("mrope_interleaved", True, required=False)
    dims = int(head_dim * rope.number("partial_rotary_factor", 0, 1))
    sections = tuple(rope.get("mrope_section", list))
    if len(sections) != 3 or not all(is_whole(s) and s >= 0 for s in sections) or 2 * sum(sections) != dims:
        rule = f"three counts that add up to half of the rotated dims ({dims} of head_dim {head_dim})"
        raise rope.invalid("mrope_section", rule, list(sections))
    if not dims or any(axis + 3 * (sections[axis] - 1) >= dims // 2 for axis in (1, 2)):
        raise rope.invalid("mrope_section", f"counts that interleave within {dims // 2} pairs", list(sections))
    yarn = _read_yarn(rope) if rope.values["rope_type"] == "yarn" else None
    return RopeConfig(rope.number("rope_theta", 2 if yarn else 1, 1e30), dims, sections, yarn)


def _read_yarn(rope: Fields) -> Yarn:
    factor = rope.number("factor", 1, MOST_FACTOR)
    fast, slow = (rope.number(name, 2**-10, 2**20, absent) for name, absent in (("beta_fast", 32), ("beta_slow", 1)))
    if fast < slow:
        raise rope.invalid("beta_fast", f"at least 'beta_slow' ({slow:g})", fast)
    mscale, all_dim = (rope.number(name, 0, 100, 0.0) for name in ("mscale", "mscale_all_dim"))
    scale = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor)
    return Yarn(
        factor,
        _original(rope),
        rope.number("attention_factor", 2**-10, 2**10, scale),
        fast,
        slow,
        not rope.has("truncate") or rope.get("truncate", bool),
    )


def _mscale(factor: float, mscale: float = 1) -> float:
    return 0.1 * mscale * math.log(factor) + 1


def _original(rope: Fields) -> int:
    """Required, though transformers puts max_position_embeddings in its place: other frequencies, without a word."""
    return rope.size("original_max_position_embeddings", TRAINED)


def read_window(text: Fields, rope: RopeConfig) -> int:
    """The positions that may be used: those of training, or with YaRN the original ones times the factor.

    A max_position_embeddings above the original length limits YaRN's. Without YaRN InputError for more than TRAINED.
    """
    most = text.size("max_position_embeddings", _POSITIONS)
    if rope.yarn:
        reach = int(rope.yarn.original * rope.yarn.factor)
        return min(reach, most) if most > rope.yarn.original else reach
    if most > TRAINED:
        raise InputError(
            "config_field_unsupported",
            f"{text.where}: 'max_position_embeddings' must be at most {TRAINED:,} without a scaling of positions, got "
            f"{most:,}. {spelled('rope_scaling', 'yarn')} reads beyond, {spelled('rope_scaling', 'none')} stays within",
        )
    return most


# --- the option ------------------------------------------------------------------------------------------------------


def check_rope_scaling(name: str, value: Any) -> str:
    """ "none", or "yarn:FACTOR"; the factor is FACTOR where only "yarn" is given."""
    if value == "none":
        return "none"
    kind, colon, given = value.partition(":") if isinstance(value, str) else ("", "", "")
    try:
        factor = float(given) if colon else FACTOR
    except ValueError:
        factor = math.nan
    if kind != "yarn" or not 1 < factor <= MOST_FACTOR:
        raise InputError(
            "option_invalid",
            f"{name} must be yarn, yarn:FACTOR with a factor above 1 and at most {MOST_FACTOR:g}, or none, got "
            f"{shown(value)}",
        )
    return f"yarn:{factor}"


def wider(rope: RopeConfig, window: int, positions: int) -> str | None:
    """The scaling, as of the option, that makes room for more positions than the window has; None: none does."""
    factor = max(FACTOR, math.ceil(positions / (rope.yarn.original if rope.yarn else window)))
    if factor > MOST_FACTOR:
        return None
    return "yarn" if factor == FACTOR else f"yarn:{factor:g}"


def rescaled(values: Mapping[str, Any], scaling: str | None) -> dict[str, Any]:
    """The values of config.json with another scaling, in rope_parameters as transformers reads it.

    scaling: as `check_rope_scaling` returns it; None changes nothing. The type before must be one of TYPES.
    max_position_embeddings becomes the length of training, as on the card of the published checkpoints: the original
    one of the scaling before where it has one, else at most TRAINED.
    """
    if scaling is None:
        return dict(values)
    top = Fields(values, "config.json")
    nested = "text_config" in values
    text = Fields(top.object("text_config") or {}, "config.json: text_config") if nested else top
    rope = Fields(rope_parameters(text), f"{text.where}.rope_parameters")
    scaled = rope.values.get("rope_type") == "yarn" and rope.has("original_max_position_embeddings")
    trained = _original(rope) if scaled else min(TRAINED, text.size("max_position_embeddings", _POSITIONS))
    block = {name: value for name, value in rope.values.items() if name not in _YARN} | {"rope_type": "default"}
    if scaling != "none":
        factor = float(scaling.partition(":")[2])
        block |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    renewed = {name: value for name, value in text.values.items() if name not in OLDER}
    renewed |= {"rope_parameters": block, "max_position_embeddings": trained}
    return {**values, "text_config": renewed} if nested else renewed
