"""The names that programs give to a checkpoint's tensors, and what a name tells of how norms are stored."""

TEXT, VISION, MTP = "model.language_model.", "model.visual.", "mtp."

# Longest first. mlx-lm and mlx-vlm put "language_model." in front; Hugging Face's text-only class has bare "model.".
_PREFIXES = (
    ("language_model.model.visual.", VISION), ("model.language_model.visual.", VISION), ("vision_tower.", VISION),
    ("model.visual.", VISION), ("visual.", VISION),
    ("language_model.mtp.", MTP), ("model.mtp.", MTP), ("mtp.", MTP),
    ("language_model.lm_head.", "lm_head."), ("lm_head.", "lm_head."),
    ("model.language_model.", TEXT), ("language_model.model.", TEXT), ("model.", TEXT),
)  # fmt: skip

_ZERO_CENTRED = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight",
    "language_model.norm.weight", "mtp.norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight",
)  # fmt: skip


def hugging_face_name(name: str) -> str:
    """The name that Hugging Face gives to a tensor or module of any layout; unknown names stay as they are."""
    for prefix, own in _PREFIXES:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def head_name(name: str) -> str:
    """The same for one of the draft head, which has bare names where nothing else lies beside it."""
    known = hugging_face_name(name)
    return known if known.startswith(MTP) else MTP + name


def is_zero_centred(name: str) -> bool:
    """Whether the tensor of this Hugging Face name is a norm weight stored as gamma - 1 (Qwen3_5RMSNorm)."""
    return name.endswith(_ZERO_CENTRED) and not name.startswith(VISION)
