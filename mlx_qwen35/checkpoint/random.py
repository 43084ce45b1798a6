"""Random checkpoints in Hugging Face's layout, for tests and bench: the text is noise, the sizes are real. And headers
alone, for plans.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.config import FULL, LINEAR, parse_config
from mlx_qwen35.checkpoint.folder import INDEX, SINGLE
from mlx_qwen35.checkpoint.names import is_zero_centred
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes, vision_shapes

# hidden, intermediate, layers, query heads, key/value heads, DeltaNet key heads, DeltaNet value heads, tied head,
# vision depth, hidden, intermediate, heads.  Published sizes; 27b from public copies of its configuration.
_FAMILY = {
    "0.8b": (1024, 3584, 24, 8, 2, 16, 16, True, 12, 768, 3072, 12),
    "2b": (2048, 6144, 24, 8, 2, 16, 16, True, 24, 1024, 4096, 16),
    "4b": (2560, 9216, 32, 16, 4, 16, 32, True, 24, 1024, 4096, 16),
    "9b": (4096, 12288, 32, 16, 4, 16, 32, False, 27, 1152, 4304, 16),
    "27b": (5120, 17408, 64, 24, 4, 16, 48, False, 27, 1152, 4304, 16),
    "mid": (512, 1536, 8, 4, 2, 4, 8, True, 2, 256, 512, 4),
    "tiny": (256, 448, 4, 5, 1, 2, 6, True, 2, 192, 576, 3),
}
_VOCABULARY = {"mid": 32768, "tiny": 1024}
_SPECIAL = {"eos": 0, "image": 12, "video": 13, "vision_start": 9, "vision_end": 10}  # after the base vocabulary

GEOMETRIES = tuple(_FAMILY)


def geometry(name: str) -> dict[str, Any]:
    """The config.json of a member of the family, or of one of two small models.

    `mid` has 61M text parameters with the real head sizes. All sizes of `tiny` differ, so that a swapped axis shows,
    and are multiples of 64 where a matrix is quantized.
    """
    hidden, inner, layers, heads, kv, key_heads, value_heads, tied, *vision = _FAMILY[name]
    vocabulary = _VOCABULARY.get(name, 248320)
    first_special = 248044 if vocabulary == 248320 else vocabulary - 33
    ids = {f"{key}_token_id": first_special + offset for key, offset in _SPECIAL.items()}
    tiny = name == "tiny"
    text = {
        "model_type": "qwen3_5_text", "dtype": "bfloat16", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": 128 if tiny else 256, "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads, "linear_key_head_dim": 96 if tiny else 128,
        "linear_value_head_dim": 64 if tiny else 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
        "layer_types": [FULL if (i + 1) % 4 == 0 else LINEAR for i in range(layers)], "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
        "mamba_ssm_dtype": "float32", "tie_word_embeddings": tied, "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False, "mlp_only_layers": [], "max_position_embeddings": 262144,
        "initializer_range": 0.02, "use_cache": True, "eos_token_id": ids.pop("eos_token_id"),
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
            "mrope_section": [6, 5, 5] if tiny else [11, 11, 10],
        },
    }  # fmt: skip
    depth, vision_hidden, vision_inner, vision_heads = vision
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "tie_word_embeddings": tied,
        "text_config": text, **ids,
        "vision_config": {
            "model_type": "qwen3_5", "depth": depth, "hidden_size": vision_hidden, "intermediate_size": vision_inner,
            "num_heads": vision_heads, "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2,
            "spatial_merge_size": 2, "num_position_embeddings": 64 if tiny else 2304, "out_hidden_size": hidden,
            "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": [], "initializer_range": 0.02,
        },
    }  # fmt: skip


def _log_uniform(low: float, high: float, count: int) -> mx.array:
    return mx.exp(mx.random.uniform(math.log(low), math.log(high), (count,)))


def _alternate(slow: mx.array, fast: mx.array) -> mx.array:
    return mx.where(mx.arange(slow.size) % 2 == 0, slow, fast)


def _random_tensor(name: str, shape: tuple[int, ...]) -> mx.array:
    """Values in the range of trained ones. Even heads decay slowly (0.99 a token or slower), odd heads fast."""
    if name.endswith("A_log"):
        return mx.log(_alternate(_log_uniform(0.05, 0.5, *shape), _log_uniform(1.0, 16.0, *shape)))
    if name.endswith("dt_bias"):
        dt = _alternate(_log_uniform(1e-3, 1e-2, *shape), _log_uniform(1e-2, 0.3, *shape))
        return mx.log(mx.expm1(dt))
    if name.endswith("linear_attn.norm.weight"):
        return 1.0 + 0.1 * mx.random.normal(shape)
    if name.endswith("bias"):
        return 0.3 * mx.random.normal(shape)
    if len(shape) == 1:
        return (0.0 if is_zero_centred(name) else 1.0) + 0.1 * mx.random.normal(shape)
    fan_in = math.prod(shape[1:])
    scale = 0.02 if "embed" in name or name == "lm_head.weight" else fan_in**-0.5
    return mx.random.normal(shape) * (scale * (0.25 if "in_proj_a" in name else 1.0))


def is_float32(name: str) -> bool:
    """Whether a tensor is float32 in the published checkpoints, among bfloat16 ones."""
    return name.endswith(("A_log", "linear_attn.norm.weight"))


def write_random_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: mx.Dtype = mx.bfloat16,
    mtp: bool = True,
    vision: bool = True,
    shard_bytes: float = 2e9,
    tensor: Callable[[str, tuple[int, ...]], mx.array] = _random_tensor,
) -> Path:
    """Write config.json, safetensors shards and index of a random model, and return the folder.

    Names, shapes, dtypes, conv layout, zero-centred norms and shard names are those of the published checkpoints.
    The same seed gives the same bytes. At most one shard is in memory.
    """
    mx.random.seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    parsed = parse_config(config)
    shapes = text_shapes(parsed.text)
    shapes |= vision_shapes(parsed.vision) if vision and parsed.vision else {}
    shapes |= mtp_shapes(parsed.text) if mtp else {}
    width = dtype.size
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * width
        if shards[-1] and used + nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = f"model.safetensors-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for name in names:
            arrays[name] = tensor(name, shapes[name]).astype(mx.float32 if is_float32(name) else dtype)
            mx.eval(arrays[name])
        mx.save_safetensors(str(folder / file), arrays, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(array.nbytes for array in arrays.values())
        del arrays
        mx.clear_cache()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    return folder


def write_headers(folder: Path, config: Mapping[str, Any]) -> Path:
    """The published layout without its numbers: a header, and a hole behind it."""
    parsed, header, end = parse_config(config), {}, 0
    vision = vision_shapes(parsed.vision) if parsed.vision else {}
    for name, shape in (text_shapes(parsed.text) | vision | mtp_shapes(parsed.text)).items():
        start, end = end, end + math.prod(shape) * (4 if is_float32(name) else 2)
        header[name] = {"dtype": "F32" if is_float32(name) else "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
