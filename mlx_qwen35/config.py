"""config.json -> frozen dataclasses. A field that changes the computation has no default: absent, it is an error."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError

LINEAR, FULL = "linear_attention", "full_attention"
SUPPORTED = "dense Qwen3.5 (0.8B, 2B, 4B, 9B, 27B), model_type 'qwen3_5' or 'qwen3_5_text'"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the gated-attention layers (interleaved M-RoPE over three position axes)."""

    theta: float
    dims: int  # rotated dims of each head, the first ones
    sections: tuple[int, int, int]  # how many of the dims / 2 frequencies follow the T, H and W axis


@dataclass(frozen=True)
class TextConfig:
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    mtp_num_hidden_layers: int

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def key_dim(self) -> int:
        """Width of q, and of k, in a DeltaNet layer: Hk * Dk."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of v, and of the output gate z, in a DeltaNet layer: Hv * Dv."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def delta_heads(self) -> tuple[int, int, int, int, int]:
        """Hk, Hv, Dk, Dv of a DeltaNet layer, and its conv taps."""
        return (
            self.linear_num_key_heads, self.linear_num_value_heads, self.linear_key_head_dim,
            self.linear_value_head_dim, self.linear_conv_kernel_dim,
        )  # fmt: skip

    @property
    def attention_heads(self) -> tuple[int, int, int, int]:
        """H, Hk and D of an attention layer, and how many of the D turn."""
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.rope.dims

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: q, k and v side by side."""
        return 2 * self.key_dim + self.value_dim


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    out_hidden_size: int


@dataclass(frozen=True)
class Config:
    """One checkpoint's configuration.

    `vision` is None for a text-only checkpoint. `eos_token_ids` are those that config.json and generation_config.json
    name; the tokenizer adds its own. `greedy` says that generation_config.json has do_sample false. `quantization` is
    the "quantization" entry of a folder written by MLX programs: the default {"group_size", "bits", "mode"} and
    overrides by module path.
    """

    text: TextConfig
    vision: VisionConfig | None
    eos_token_ids: tuple[int, ...]
    greedy: bool
    token_ids: Mapping[str, int]  # image, video, vision_start, vision_end; empty for a text-only checkpoint
    quantization: Mapping[str, Any]
    format_tag: Mapping[str, Any] | None  # the "mlx_qwen35" entry that our converter writes


# Fields that would change the computation and that no checkpoint of this family sets.
_ABSENT = ("mlp_only_layers", "rope_scaling", "use_sliding_window", "sliding_window", "mlp_bias")


class Fields:
    """Typed reading of one JSON object that names the field, its place and the rule in every error."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, name: str, kind: type) -> Any:
        if self.values.get(name) is None:
            raise InputError(
                "config_field_missing", f"{self.where} must hold {name!r}; it is absent, and no default would be right"
            )
        return self.check(name, self.values[name], kind)

    def check(self, name: str, value: Any, kind: type) -> Any:
        number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if not number and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise InputError(
                "config_field_invalid", f"{self.where}: {name!r} must be of type {kind.__name__}, got {value!r}"
            )
        return value

    def size(self, name: str) -> int:
        value = self.get(name, int)
        if value < 1:
            raise InputError("config_field_invalid", f"{self.where}: {name!r} must be at least 1, got {value}")
        return value

    def positive(self, name: str) -> float:
        value = float(self.get(name, float))
        if not 0 < value < math.inf:
            raise InputError("config_field_invalid", f"{self.where}: {name!r} must be above 0 and finite, got {value}")
        return value

    def only(self, name: str, *supported: Any, required: bool = True) -> None:
        """The field changes the computation and only these values are implemented."""
        if not required and self.values.get(name) is None:
            return
        value = self.get(name, type(supported[0]))
        if value not in supported:
            known = " or ".join(map(repr, supported))
            raise InputError(
                "config_field_unsupported", f"{self.where}: {name!r} is {value!r}; only {known} is supported"
            )


def _layer_types(text: Fields) -> tuple[str, ...]:
    count = text.size("num_hidden_layers")
    named, interval = text.values.get("layer_types"), text.values.get("full_attention_interval")
    if named is None and interval is None:
        raise InputError(
            "config_field_missing",
            f"{text.where} must hold 'layer_types' or 'full_attention_interval'; both are absent",
        )
    if interval is not None:
        every = text.size("full_attention_interval")
        derived = tuple(FULL if (i + 1) % every == 0 else LINEAR for i in range(count))
        if named is None:
            return derived
    kinds = tuple(text.get("layer_types", list))
    if len(kinds) != count or set(kinds) - {LINEAR, FULL}:
        raise InputError(
            "config_field_invalid",
            f"{text.where}: 'layer_types' must list {count} times {LINEAR!r} or {FULL!r} (num_hidden_layers), "
            f"got {len(kinds)} entries of {sorted(set(kinds))}",
        )
    return kinds


def _rope(text: Fields, head_dim: int) -> RopeConfig:
    values = text.get("rope_parameters", dict)
    if "rope_type" not in values and "type" in values:  # mlx-lm renames it in what it writes
        values = {**values, "rope_type": values["type"]}
    rope = Fields(values, f"{text.where}.rope_parameters")
    rope.only("rope_type", "default")
    rope.only("mrope_interleaved", True, required=False)
    dims = round(head_dim * rope.get("partial_rotary_factor", float))
    sections = tuple(rope.get("mrope_section", list))
    if len(sections) != 3 or not all(isinstance(s, int) and s >= 0 for s in sections) or 2 * sum(sections) != dims:
        raise InputError(
            "config_field_invalid",
            f"{rope.where}: 'mrope_section' must be three counts that add up to half of the rotated dims "
            f"({dims} of head_dim {head_dim}), got {list(sections)}",
        )
    if any(axis + 3 * (sections[axis] - 1) >= dims // 2 for axis in (1, 2)):
        raise InputError(
            "config_field_invalid",
            f"{rope.where}: 'mrope_section' {list(sections)} does not interleave within {dims // 2} pairs",
        )
    return RopeConfig(rope.positive("rope_theta"), dims, sections)


def _text_config(values: Mapping[str, Any], where: str, tied: bool | None) -> TextConfig:
    text = Fields(values, where)
    text.only("hidden_act", "silu")
    text.only("attn_output_gate", True, required=False)
    text.only("attention_bias", False)
    text.only("mamba_ssm_dtype", "float32", required=False)
    text.only("output_gate_type", "swish", "silu", required=False)
    text.only("mtp_use_dedicated_embeddings", False, required=False)
    for name in _ABSENT:
        if values.get(name):
            raise InputError(
                "config_field_unsupported",
                f"{where}: {name!r} must be absent or empty, got {values[name]!r}; it is not supported",
            )
    sizes = {
        name: text.size(name)
        for name in (
            "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
            "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
            "linear_conv_kernel_dim", "max_position_embeddings",
        )
    }  # fmt: skip
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if sizes[many] % sizes[few]:
            raise InputError(
                "config_field_invalid",
                f"{where}: {many!r} ({sizes[many]}) must be a multiple of {few!r} ({sizes[few]})",
            )
    if sizes["linear_conv_kernel_dim"] < 2:
        raise InputError(
            "config_field_invalid",
            f"{where}: 'linear_conv_kernel_dim' must be at least 2, got {sizes['linear_conv_kernel_dim']}",
        )
    tied = values.get("tie_word_embeddings") if tied is None else tied
    if tied is None:
        raise InputError(
            "config_field_missing",
            f"{where} must hold 'tie_word_embeddings'; it is absent, and no default would be right",
        )
    return TextConfig(
        **sizes,
        layer_types=_layer_types(text),
        rms_norm_eps=text.positive("rms_norm_eps"),
        rope=_rope(text, sizes["head_dim"]),
        tie_word_embeddings=text.check("tie_word_embeddings", tied, bool),
        mtp_num_hidden_layers=text.check("mtp_num_hidden_layers", values.get("mtp_num_hidden_layers") or 0, int),
    )


def _vision_config(values: Mapping[str, Any]) -> VisionConfig:
    vision = Fields(values, "config.json: vision_config")
    vision.only("hidden_act", "gelu_pytorch_tanh")
    if values.get("deepstack_visual_indexes"):
        raise InputError(
            "config_field_unsupported",
            f"{vision.where}: 'deepstack_visual_indexes' must be empty, got {values['deepstack_visual_indexes']}",
        )
    return VisionConfig(**{name: vision.size(name) for name in VisionConfig.__dataclass_fields__})


def _refuse_other_architectures(values: Mapping[str, Any]) -> None:
    kind = values.get("model_type")
    names = f"{kind} {values.get('architectures')}"
    if "moe" in names.lower() or (_object(values, "text_config") or values).get("num_experts"):
        raise InputError(
            "model_type_unsupported",
            f"this is a mixture-of-experts checkpoint (model_type {kind!r}); supported are the {SUPPORTED}. "
            "Use mlx-lm or mlx-vlm for the mixture-of-experts siblings",
        )
    if kind not in ("qwen3_5", "qwen3_5_text"):
        raise InputError(
            "model_type_unsupported", f"config.json: 'model_type' is {kind!r}; supported are the {SUPPORTED}"
        )


def _token_list(value: Any, where: str) -> tuple[int, ...]:
    tokens = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(token) is int for token in tokens):
        raise InputError(
            "config_field_invalid", f"{where}: 'eos_token_id' must be a token id or a list of them, got {value!r}"
        )
    return tokens


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    value = values.get(name)
    if value is not None and not isinstance(value, dict):
        raise InputError("config_field_invalid", f"config.json: {name!r} must be an object, got {value!r}")
    return value


def parse_config(values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Config:
    """Build a Config from the parsed config.json and, where there is one, generation_config.json.

    Raises InputError naming the field that is absent, of the wrong type, or asks for something not implemented.
    """
    _refuse_other_architectures(values)
    nested = "text_config" in values
    text_values = (_object(values, "text_config") or {}) if nested else values
    where = "config.json: text_config" if nested else "config.json"
    text = _text_config(text_values, where, values.get("tie_word_embeddings"))
    vision, token_ids = None, {}
    if nested and _object(values, "vision_config") is not None:
        vision = _vision_config(values["vision_config"])
        if vision.out_hidden_size != text.hidden_size:
            raise InputError(
                "config_field_invalid",
                f"config.json: vision out_hidden_size ({vision.out_hidden_size}) must equal the text hidden_size "
                f"({text.hidden_size})",
            )
        top = Fields(values, "config.json")
        names = ("image", "video", "vision_start", "vision_end")
        token_ids = {name: top.get(f"{name}_token_id", int) for name in names}
    eos = _token_list(text_values.get("eos_token_id"), where) + _token_list(values.get("eos_token_id"), "config.json")
    eos += _token_list((generation or {}).get("eos_token_id"), "generation_config.json")
    return Config(
        text=text,
        vision=vision,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        greedy=(generation or {}).get("do_sample") is False,
        token_ids=token_ids,
        quantization=_object(values, "quantization") or {},
        format_tag=_object(values, "mlx_qwen35"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError if it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError("json_invalid", f"{path} must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError("json_invalid", f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values


def read_config(folder: Path) -> Config:
    """The configuration of a checkpoint folder. Raises InputError when there is none or it is not of this family."""
    if not (folder / "config.json").is_file():
        raise InputError("config_missing", f"a checkpoint folder must hold config.json; {folder} does not")
    generation = folder / "generation_config.json"
    return parse_config(read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None)
