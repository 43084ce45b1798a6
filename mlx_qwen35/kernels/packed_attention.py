"""Attention over quantized keys and values.

A few queries read them packed: on a GPU by packed_attention.metal and packed_attention_join.metal, if these agree with
the definition on a small case of the same geometry and dtype (`self_check`); on the CPU by quantized products. For more
queries the keys and values are dequantized first.

Letters: B batch, H/Hk query/key heads, T queries, D head size, S columns in use of C.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import fused
from mlx_qwen35.kernels.attention import attention, definition

GROUP = 64  # elements of a head that share a scale and a bias
FEW_QUERIES = 8  # that the kernel takes
FEW_ROWS = 16  # queries of all heads of a key head that a threadgroup takes, and up to which quantized products pay
BLOCK = 256  # keys whose contribution is one partial result
SIMD = 32
SIMDGROUPS = 4  # of a threadgroup, for each of its queries
JOINING = 512  # threads of a threadgroup that joins blocks


class Packed(NamedTuple):
    """Keys or values (B, Hk, C, D), each column quantized by itself in groups of GROUP along D (MLX's affine mode)."""

    words: mx.array  # (B, Hk, C, D * bits / 32) uint32
    scales: mx.array  # (B, Hk, C, D / GROUP)
    biases: mx.array  # like scales
    bits: int

    def first(self, S: int) -> "Packed":
        """The first S columns."""
        words, scales, biases = (array[:, :, :S] for array in self[:3])
        return Packed(words, scales, biases, self.bits)


@dataclass(frozen=True)
class Geometry:
    """What the kernel is compiled for."""

    rows: int  # query heads of a key head
    D: int
    key_bits: int
    value_bits: int

    @property
    def supported(self) -> bool:
        """Whether the kernel has these sizes."""
        bits = {self.key_bits, self.value_bits}
        return self.D in (64, 128, 256) and self.rows <= FEW_ROWS // 2 and bits <= {4, 8}


def pack(x: mx.array, bits: int) -> Packed:
    """(B, Hk, S, D) of a floating dtype -> the same in `bits`; scales and biases have x's dtype."""
    return Packed(*mx.quantize(x, group_size=GROUP, bits=bits), bits)


def unpack(packed: Packed) -> mx.array:
    """(B, Hk, S, D) in the dtype of the scales."""
    words, scales, biases, bits = packed
    return mx.dequantize(words, scales, biases, group_size=GROUP, bits=bits)


def packed_attention(
    q: mx.array, keys: Packed, values: Packed, scale: float, causal: bool, length: int | None = None
) -> mx.array:
    """`attention` over quantized keys and values: q (B, H, T, D) -> (B, H, T, D).

    Args:
        q: of the dtype of the scales.
        length: S of the C columns are in use; None: all. Whole arrays are read where they lie; of a slice of several
            heads MLX would make a copy first.
        scale, causal: as in `attention`.
    """
    (_, H, T, D), (_, Hk, C, _) = q.shape, keys.words.shape
    S = C if length is None else length
    sizes, in_order = Geometry(H // Hk, D, keys.bits, values.bits), causal or T == 1
    if backend().fused_kernels and in_order and T <= FEW_QUERIES and sizes.supported and self_check(sizes, q.dtype):
        return fused_attention(q, keys, values, scale, S)
    if backend().tiles_attention and in_order and T * sizes.rows <= FEW_ROWS:
        return product_attention(q, keys, values, scale, S)
    k = unpack(keys)
    if backend().tiles_attention:
        mx.eval(k)  # MLX's CPU backend takes memory ahead of the work: what it makes of both on the way, at once
    return attention(q, k[:, :, :S], unpack(values)[:, :, :S], scale, causal)


def product_attention(q: mx.array, keys: Packed, values: Packed, scale: float, S: int) -> mx.array:
    """Causal attention by quantized products in float32, which take as long for each query as for the first.

    S of the C columns are in use.
    """
    (B, H, T, D), Hk = q.shape, keys.words.shape[1]
    rows = (q.astype(mx.float32) * scale).reshape(B * Hk, -1, D)
    scores = _products(rows, keys, S, transpose=True).reshape(B, H, T, S)
    weights = mx.softmax(scores + mx.triu(mx.full((T, S), -mx.inf), S - T + 1), axis=-1)
    return _products(weights.reshape(B * Hk, -1, S), values, S, transpose=False).reshape(q.shape).astype(q.dtype)


def _products(x: mx.array, packed: Packed, S: int, transpose: bool) -> mx.array:
    """Head by head, whose columns in use lie side by side: MLX would copy the slice of all heads."""
    parts = (array.flatten(0, 1)[:, :S] for array in packed[:3])
    return mx.stack(
        [
            mx.quantized_matmul(rows, words, scales, biases, transpose=transpose, group_size=GROUP, bits=packed.bits)
            for rows, words, scales, biases in zip(x, *parts, strict=True)
        ]
    )


def fused_attention(q: mx.array, keys: Packed, values: Packed, scale: float, S: int) -> mx.array:
    """Run the kernels: T queries (B, H, T, D), of the last T of S positions, over the first S of C columns.

    The bits of a query depend on no other query, and on no key behind it. The geometry must be supported.
    """
    (B, H, T, D), (_, Hk, C, _) = q.shape, keys.words.shape
    sizes = Geometry(H // Hk, D, keys.bits, values.bits)
    assert sizes.supported and 0 < T <= min(S, FEW_QUERIES) and S <= C, f"not supported: {sizes}, {T} of {S} of {C}"
    assert {q.dtype} == {array.dtype for packed in (keys, values) for array in packed[1:3]}, "one dtype"
    blocks = -(-S // BLOCK)
    queries = next(n for n in (4, 3, 2, 1) if T % n == 0 and n * sizes.rows <= FEW_ROWS)
    named = ((f"{name}_{part}", array) for name, packed in (("key", keys), ("value", values))
             for part, array in zip(("words", "scales", "biases"), packed[:3], strict=True))  # fmt: skip
    outputs = fused.launch(
        "packed_attention",
        inputs={"queries": q, **dict(named), "columns": C, "length": S, "tokens": T, "score_scale": scale},
        outputs={
            "partial": ((B, H, T, blocks, D), mx.float32), "tops": ((B, H, T, blocks), mx.float32),
            "sums": ((B, H, T, blocks), mx.float32),
        },
        template={
            "Element": q.dtype, "HEAD_DIM": D, "ROWS": sizes.rows, "KEY_BITS": keys.bits, "VALUE_BITS": values.bits,
            "QUERIES": queries, "SIMDGROUPS": SIMDGROUPS, "BLOCK": BLOCK,
        },
        grid=(SIMD * SIMDGROUPS * blocks, T, B * Hk),
        threadgroup=(SIMD * SIMDGROUPS, queries, 1),
    )  # fmt: skip
    names = ("partial", "tops", "sums")
    (attended,) = fused.launch(
        "packed_attention_join",
        inputs={**dict(zip(names, outputs, strict=True)), "blocks": blocks},
        outputs={"attended": (q.shape, q.dtype)},
        template={"Element": q.dtype, "HEAD_DIM": D, "SPLITS": JOINING // D},
        grid=(D, JOINING // D, B * H * T),
        threadgroup=(D, JOINING // D, 1),
    )
    return attended


@functools.cache
def self_check(sizes: Geometry, dtype: mx.Dtype) -> bool:
    """Whether the kernels agree with the definition on this machine. Warns once if they do not."""
    return fused.agrees("packed_attention", lambda: _cases(sizes, dtype))


def _cases(sizes: Geometry, dtype: mx.Dtype) -> Iterator[fused.Case]:
    """Two key heads; four queries over two blocks of keys, and one over one key."""
    if not sizes.supported:
        raise ValueError(f"it does not support {sizes}")
    C, D = BLOCK + 44, sizes.D
    q, k, v = fused.normal_arrays((1, 2 * sizes.rows, 4, D), (1, 2, C, D), (1, 2, C, D))
    keys, values = pack(k.astype(dtype), sizes.key_bits), pack(v.astype(dtype), sizes.value_bits)
    q, scale = (3 * q).astype(dtype), D**-0.5
    for T, S in ((4, C - 3), (1, 1)):
        whole = (_in_float32(packed.first(S)) for packed in (keys, values))
        plain = definition(q[:, :, :T], *whole)
        ours = fused_attention(q[:, :, :T], keys, values, scale, S)
        yield "output", ours, plain, fused.relative(fused.ROUNDING[dtype], plain)


def _in_float32(packed: Packed) -> mx.array:
    words, scales, biases, bits = packed
    return unpack(Packed(words, scales.astype(mx.float32), biases.astype(mx.float32), bits))
