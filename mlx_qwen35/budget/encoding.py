"""The memory that the vision encoder needs for an image or a video, and whether there is room."""

import math
from typing import Protocol

import mlx.core as mx

from mlx_qwen35.checkpoint.config import VisionConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.attention import attention_impl, score_bytes
from mlx_qwen35.options import spelled

SLICE = 1024  # patches that are encoded at a time: frames of a video, or a part of a larger image


class Encodable(Protocol):
    """An image or a video: its kind, and its grid of patches (frames, height, width). str() is for messages."""

    @property
    def kind(self) -> str: ...

    @property
    def grid(self) -> tuple[int, int, int]: ...


def check_encoding_fits(media: Encodable, config: VisionConfig, dtype: mx.Dtype, limit: int) -> None:
    """Raise InputError for an image or a video whose encoding does not fit beside what is in memory.

    limit: bytes that the model may take.
    """
    impl = attention_impl(config.hidden_size // config.num_heads, dtype)
    needed = working_bytes(config, dtype, at_once(media.grid), impl)
    used = mx.get_active_memory()
    if used + needed > limit:
        raise InputError(
            "memory_exceeded",
            f"to be encoded, this {media.kind} ({media}) needs {needed / 1e9:.1f} GB; a model may take "
            f"{limit / 1e9:.1f} GB, of which {used / 1e9:.1f} GB are in use. Lower "
            + spelled({"image": "max_pixels", "video": "video_total_pixels"}[media.kind]),
        )


def at_once(grid: tuple[int, int, int]) -> int:
    """Patches that are encoded together: of one frame, or of as many frames as make a slice."""
    count = math.prod(grid[1:])
    return max(count, min(SLICE, grid[0] * count))


def working_bytes(config: VisionConfig, dtype: mx.Dtype, patches: int, impl: str) -> int:
    """The bytes that encoding frames of so many patches may take beside weights and embeddings.

    They are eight times the hidden states, mostly queries, keys and values, and of one slice the hidden states twice
    more, nine times the MLP's activations, and the scores. On the CPU quantized matrices are dequantized besides.

    impl: see attention_impl.
    """
    heads, tile = config.num_heads, min(patches, SLICE)
    scores = score_bytes((1, heads, tile, config.hidden_size // heads), patches, dtype.size, impl)
    within = tile * (2 * config.hidden_size + 9 * config.intermediate_size) * dtype.size
    dequantized = 4 * 4 * config.hidden_size * config.intermediate_size if impl == "cpu" else 0
    return 8 * patches * config.hidden_size * dtype.size + within + scores + dequantized
