"""config.json -> frozen dataclasses. A field that changes the computation has no default: absent, it is an error."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.rope_fields import RopeConfig, read_rope, read_window, rescaled
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import WIDTH, Fields, read_json
from mlx_qwen35.values import is_whole, shown

LINEAR, FULL = "linear_attention", "full_attention"
LAYERS = 1024  # at most: bounded before anything is made for each layer
EPS = (2.0**-126, 1.0)  # of a norm: normal numbers of float32, below the size of a normed value
SUPPORTED = "dense Qwen3.5 (0.8B, 2B, 4B, 9B, 27B), model_type 'qwen3_5' or 'qwen3_5_text'"


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
    max_position_embeddings: int  # positions that may be used, scaling included
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

    vision: None for a text-only checkpoint. eos_token_ids: of config.json and generation_config.json; the tokenizer has
    its own. greedy: whether generation_config.json has do_sample false. quantization: the "quantization" entry of a
    folder of an MLX program: the default {"group_size", "bits", "mode"} and overrides by module path.
    """

    text: TextConfig
    vision: VisionConfig | None
    eos_token_ids: tuple[int, ...]
    greedy: bool
    token_ids: Mapping[str, int]  # image, video, vision_start, vision_end; empty for a text-only checkpoint
    quantization: Mapping[str, Any]
    format_tag: Mapping[str, Any] | None  # the "mlx_qwen35" entry that our converter writes


# Fields that would change the computation and that no checkpoint of this family sets.
_ABSENT = ("mlp_only_layers", "use_sliding_window", "sliding_window", "mlp_bias")

_TEXT_SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim",
)  # fmt: skip
_VISION_MOST = {"depth": LAYERS, "patch_size": 1024, "spatial_merge_size": 1024}  # of the others: WIDTH


def _layer_types(text: Fields) -> tuple[str, ...]:
    count = text.size("num_hidden_layers", LAYERS)
    every = text.size("full_attention_interval", LAYERS) if text.has("full_attention_interval") else None
    if not text.has("layer_types"):
        if every is None:
            names = "'layer_types' or 'full_attention_interval'"
            raise InputError("config_field_missing", f"{text.where} must hold {names}; both are absent")
        return tuple(FULL if (i + 1) % every == 0 else LINEAR for i in range(count))
    kinds = text.get("layer_types", list)
    strange = [kind for kind in kinds if kind not in (LINEAR, FULL)]
    if len(kinds) != count or strange:
        rule = f"a list of {count} times {LINEAR!r} or {FULL!r} (num_hidden_layers)"
        raise text.invalid("layer_types", rule, f"{len(kinds)} entries, {strange[:1]}")
    return tuple(kinds)


def _unsupported(fields: Fields, name: str) -> InputError:
    return InputError(
        "config_field_unsupported",
        f"{fields.where}: {name!r} is not supported: it must be absent or empty, got {shown(fields.values[name])}",
    )


def _check_multiple(fields: Fields, many: str, size: int, few: str, unit: int) -> None:
    if size % unit:
        raise fields.invalid(many, f"a multiple of {few} ({unit})", size)


def _text_config(text: Fields) -> TextConfig:
    text.only("hidden_act", "silu")
    text.only("attn_output_gate", True, required=False)
    text.only("attention_bias", False)
    text.only("mamba_ssm_dtype", "float32", required=False)
    text.only("output_gate_type", "swish", "silu", required=False)
    text.only("mtp_use_dedicated_embeddings", False, required=False)
    for name in _ABSENT:
        if text.values.get(name):
            raise _unsupported(text, name)
    sizes = {name: text.size(name) for name in _TEXT_SIZES}
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        _check_multiple(text, many, sizes[many], repr(few), sizes[few])
    _check_multiple(text, "head_dim", sizes["head_dim"], "the two halves that turn", 2)
    if sizes["linear_conv_kernel_dim"] < 2:
        raise text.invalid("linear_conv_kernel_dim", "at least 2", sizes["linear_conv_kernel_dim"])
    rope = read_rope(text, sizes["head_dim"])
    return TextConfig(
        **sizes,
        layer_types=_layer_types(text),
        rms_norm_eps=text.number("rms_norm_eps", *EPS),
        rope=rope,
        max_position_embeddings=read_window(text, rope),
        tie_word_embeddings=text.get("tie_word_embeddings", bool),
        mtp_num_hidden_layers=text.whole("mtp_num_hidden_layers", 0, LAYERS, absent=0),
    )


def _vision_config(values: Mapping[str, Any], width: int) -> VisionConfig:
    vision = Fields(values, "config.json: vision_config")
    vision.only("hidden_act", "gelu_pytorch_tanh")
    if values.get("deepstack_visual_indexes"):
        raise _unsupported(vision, "deepstack_visual_indexes")
    vision.only("in_channels", 3)
    vision.only("temporal_patch_size", 2)
    names = VisionConfig.__dataclass_fields__
    config = VisionConfig(**{name: vision.size(name, _VISION_MOST.get(name, WIDTH)) for name in names})
    heads = 4 * config.num_heads  # half of each head turns by rows, half by columns, in pairs
    _check_multiple(vision, "hidden_size", config.hidden_size, "four times 'num_heads'", heads)
    if config.out_hidden_size != width:
        raise vision.invalid("out_hidden_size", f"the text model's hidden_size ({width})", config.out_hidden_size)
    return config


def _refuse_other_architectures(top: Fields) -> None:
    kind = top.values.get("model_type")
    names = f"{shown(kind)} {shown(top.values.get('architectures'))}"
    if "moe" in names.lower() or (top.object("text_config") or top.values).get("num_experts"):
        raise InputError(
            "model_type_unsupported",
            f"a mixture-of-experts checkpoint ({shown(kind)}) needs mlx-lm or mlx-vlm; here: {SUPPORTED}",
        )
    if kind not in ("qwen3_5", "qwen3_5_text"):
        raise InputError("model_type_unsupported", f"config.json: 'model_type' is {shown(kind)}; here: {SUPPORTED}")


def _end_tokens(fields: Fields) -> tuple[int, ...]:
    value = fields.values.get("eos_token_id")
    tokens = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(is_whole(token) and 0 <= token < WIDTH for token in tokens):
        raise fields.invalid("eos_token_id", "a token id or a list of token ids", value)
    return tokens


def parse_config(values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Config:
    """Build a Config from the parsed config.json and, where there is one, generation_config.json.

    Raises InputError naming the field that is absent, of the wrong type, or asks for something not implemented.
    """
    top, generation_fields = Fields(values, "config.json"), Fields(generation or {}, "generation_config.json")
    _refuse_other_architectures(top)
    nested = "text_config" in values
    text_fields = Fields(top.object("text_config") or {}, "config.json: text_config") if nested else top
    tied = [f.get("tie_word_embeddings", bool) for f in (top, text_fields) if f.has("tie_word_embeddings")]
    text_values = {**text_fields.values, "tie_word_embeddings": tied[0] if tied else None}
    text = _text_config(Fields(text_values, text_fields.where))
    vision, token_ids = None, {}
    if top.object("vision_config") is not None and nested:
        vision = _vision_config(values["vision_config"], text.hidden_size)
        names = ("image", "video", "vision_start", "vision_end")
        token_ids = {name: top.whole(f"{name}_token_id", 0, WIDTH) for name in names}
    ends = [_end_tokens(fields) for fields in (text_fields, top, generation_fields)]
    return Config(
        text=text,
        vision=vision,
        eos_token_ids=tuple(dict.fromkeys(itertools.chain(*ends))),
        greedy=generation_fields.has("do_sample") and not generation_fields.get("do_sample", bool),
        token_ids=token_ids,
        quantization=top.object("quantization") or {},
        format_tag=top.object("mlx_qwen35"),
    )


def read_config(folder: Path, rope_scaling: str | None = None) -> Config:
    """The configuration of a checkpoint folder. Raises InputError when there is none or it is not of this family.

    rope_scaling: takes the place of the folder's, see `rescaled`.
    """
    if not (folder / "config.json").is_file():
        raise InputError("config_missing", f"a checkpoint folder must hold config.json; {folder} does not")
    generation = folder / "generation_config.json"
    values = rescaled(read_json(folder / "config.json"), rope_scaling)
    return parse_config(values, read_json(generation) if generation.is_file() else None)
