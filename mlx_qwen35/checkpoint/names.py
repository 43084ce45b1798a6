"""The names of a checkpoint's tensors in each program, and the properties that follow from a name."""

TEXT, VISION, MTP = "model.language_model.", "model.visual.", "mtp."
TABLE = f"{TEXT}embed_tokens.weight"  # of tokens
HEAD = "lm_head.weight"  # of an adapter also where the head is the table of tokens

# The maps of one input, whose products are joined where that saves launches.
DELTA_INPUTS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
MLP_INPUTS = ("gate_proj", "up_proj")

# Modules around the model: each program, and each class of Hugging Face's, puts some of them in front of a name.
_WRAPPERS = ("model.", "language_model.")
_PARTS = {
    "visual.": VISION, "vision_tower.": VISION, "mtp.": MTP, "lm_head.": "lm_head.",
    "embed_tokens.": f"{TEXT}embed_tokens.", "layers.": f"{TEXT}layers.", "norm.": f"{TEXT}norm.",
}  # fmt: skip

_ZERO_CENTRED = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight",
    "language_model.norm.weight", "mtp.norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight",
)  # fmt: skip

# Tensors beside the weights that are not needed: rotary frequencies, masks and positions of older programs, factors of
# a quantized KV cache.
_SPARE = (
    "inv_freq", "position_ids", "masked_bias", "k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale",
    "k_zero_point", "v_zero_point",
)  # fmt: skip


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a tensor or module of any layout; unknown names stay as they are."""
    rest = name
    while rest.startswith(_WRAPPERS):
        rest = rest.partition(".")[2]
    first, dot, last = rest.partition(".")
    own = _PARTS.get(first + dot)
    return name if own is None else own + last


def mtp_name(name: str) -> str:
    """Hugging Face's name of a tensor or module of the MTP head, whose file may have bare names."""
    known = hugging_face_name(name)
    return known if known.startswith(MTP) else MTP + name


def is_zero_centred(name: str) -> bool:
    """Whether the tensor of this Hugging Face name is a norm weight stored as gamma - 1 (Qwen3_5RMSNorm)."""
    return name.endswith(_ZERO_CENTRED) and not name.startswith(VISION)


def is_spare(name: str) -> bool:
    """Whether the tensor of this name is no weight of a model, and ignored, as transformers does."""
    return name.rpartition(".")[2].removeprefix("original_") in _SPARE


def takes_dtype(name: str) -> bool:
    """Whether a tensor is cast to the model's dtype, like matrices; norms, convolutions and gates are float32."""
    if name.startswith(VISION):
        return not name.endswith("pos_embed.weight")
    return not name.endswith(("norm.weight", "conv1d.weight", "A_log", "dt_bias"))
