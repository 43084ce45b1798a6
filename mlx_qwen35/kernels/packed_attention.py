"""Attention over quantized keys and values."""

from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.kernels.attention import attention

GROUP = 64  # elements of a head that share a scale and a bias


class Packed(NamedTuple):
    """Keys or values (B, Hk, S, D), each column quantized by itself in groups of GROUP along D (MLX's affine mode)."""

    words: mx.array  # (B, Hk, S, D * bits / 32) uint32
    scales: mx.array  # (B, Hk, S, D / GROUP)
    biases: mx.array  # like scales
    bits: int


def pack(x: mx.array, bits: int) -> Packed:
    """(B, Hk, S, D) of a floating dtype -> the same in `bits`; scales and biases have x's dtype."""
    return Packed(*mx.quantize(x, group_size=GROUP, bits=bits), bits)


def unpack(packed: Packed) -> mx.array:
    """(B, Hk, S, D) in the dtype of the scales."""
    words, scales, biases, bits = packed
    return mx.dequantize(words, scales, biases, group_size=GROUP, bits=bits)


def packed_attention(q: mx.array, keys: Packed, values: Packed, scale: float, causal: bool) -> mx.array:
    """`attention` over quantized keys and values: q (B, H, T, D) -> (B, H, T, D)."""
    return attention(q, unpack(keys), unpack(values), scale, causal)
