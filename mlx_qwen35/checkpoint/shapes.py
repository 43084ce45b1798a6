"""The tensors of a model by its configuration: Hugging Face's names, and shapes."""

from mlx_qwen35.checkpoint.config import FULL, TextConfig, VisionConfig
from mlx_qwen35.checkpoint.names import TEXT, VISION

Shapes = dict[str, tuple[int, ...]]  # Hugging Face name -> shape


def _decoder_layer(config: TextConfig, kind: str) -> Shapes:
    c, hidden, inner = config, config.hidden_size, config.intermediate_size
    query, key_value = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if kind == FULL:
        return shapes | {
            "self_attn.q_proj.weight": (2 * query, hidden),
            "self_attn.k_proj.weight": (key_value, hidden),
            "self_attn.v_proj.weight": (key_value, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "self_attn.q_norm.weight": (c.head_dim,),
            "self_attn.k_norm.weight": (c.head_dim,),
        }
    heads = c.linear_num_value_heads
    return shapes | {
        "linear_attn.in_proj_qkv.weight": (c.conv_dim, hidden),
        "linear_attn.in_proj_z.weight": (c.value_dim, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.conv1d.weight": (c.conv_dim, 1, c.linear_conv_kernel_dim),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (c.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (hidden, c.value_dim),
    }


def text_shapes(config: TextConfig) -> Shapes:
    """Every tensor of the text model, in the order of the data."""
    shapes: Shapes = {f"{TEXT}embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for i, kind in enumerate(config.layer_types):
        shapes |= {f"{TEXT}layers.{i}.{name}": shape for name, shape in _decoder_layer(config, kind).items()}
    shapes[f"{TEXT}norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def vision_shapes(config: VisionConfig) -> Shapes:
    """Every tensor of the vision encoder."""
    c, hidden, inner = config, config.hidden_size, config.intermediate_size
    merged = hidden * c.spatial_merge_size**2
    weights: Shapes = {"patch_embed.proj": (hidden, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)}
    for i in range(c.depth):
        block = f"blocks.{i}."
        weights |= {
            f"{block}norm1": (hidden,),
            f"{block}norm2": (hidden,),
            f"{block}attn.qkv": (3 * hidden, hidden),
            f"{block}attn.proj": (hidden, hidden),
            f"{block}mlp.linear_fc1": (inner, hidden),
            f"{block}mlp.linear_fc2": (hidden, inner),
        }
    weights |= {
        "merger.norm": (hidden,),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (c.out_hidden_size, merged),
    }
    shapes: Shapes = {f"{VISION}pos_embed.weight": (c.num_position_embeddings, hidden)}
    for name, shape in weights.items():
        shapes |= {f"{VISION}{name}.weight": shape, f"{VISION}{name}.bias": shape[:1]}
    return shapes


def mtp_shapes(config: TextConfig) -> Shapes:
    """Every tensor of the multi-token-prediction head."""
    hidden = config.hidden_size
    shapes: Shapes = {"mtp.fc.weight": (hidden, 2 * hidden)}
    shapes |= {f"mtp.{name}.weight": (hidden,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    for i in range(config.mtp_num_hidden_layers):
        shapes |= {f"mtp.layers.{i}.{name}": shape for name, shape in _decoder_layer(config, FULL).items()}
    return shapes


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be quantized: the weight of a linear layer, or an embedding over tokens."""
    return len(shape) == 2 and not name.endswith("pos_embed.weight")


def keep_fp32(name: str) -> bool:
    """Whether a tensor stays float32 in any dtype of the model: the decay rates, as checkpoints store them."""
    return name.endswith("A_log")
