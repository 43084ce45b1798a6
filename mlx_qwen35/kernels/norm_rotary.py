"""Norm and rotary embedding of an attention layer's queries and keys, in one launch of norm_rotary.metal.

`plain_norm_rotary` is the definition. `queries_and_keys` chooses between the two: the kernel runs on a GPU, if it
agrees with the definition on a small case of the same geometry and dtype (`self_check`).

Letters: B batch, T tokens, H/Hk query/key heads, D head size, dims of a head that rotate. A projected token holds, for
each head, its query and then its gate (2 H D numbers), then k (Hk D) and v (Hk D).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import fused
from mlx_qwen35.kernels.add_norm import rms_norm
from mlx_qwen35.kernels.elementwise import compiled

SIMD = 32
ROWS = 4  # of a threadgroup: a row is one head of one token, and has a simdgroup
Table = tuple[mx.array, mx.array]  # cos, sin of the angles, each (B or 1, 1, T, dims / 2) float32


@dataclass(frozen=True)
class Geometry:
    """The sizes of a layer's queries and keys."""

    H: int
    Hk: int
    D: int
    dims: int

    @property
    def width(self) -> int:
        """Numbers of a projected token."""
        return 2 * (self.H + self.Hk) * self.D

    @property
    def supported(self) -> bool:
        """Whether the kernel has these sizes: D a multiple of 32, and an even number of dims."""
        return self.D % SIMD == 0 and self.dims % 2 == 0 and 0 < self.dims <= self.D

    @classmethod
    def of(cls, rotary: Table, q_norm: mx.array, H: int, Hk: int) -> "Geometry":
        return cls(H, Hk, q_norm.shape[0], 2 * rotary[0].shape[-1])


def norm_rotary(
    projected: mx.array, rotary: Table, q_norm: mx.array, k_norm: mx.array, eps: float, H: int, Hk: int
) -> tuple[mx.array, mx.array]:
    """Run the kernel over T tokens and return q (B, H, T, D) and k (B, Hk, T, D) in the dtype of the projections.

    Args:
        projected: (B, T, 2 H D + 2 Hk D), whole: a slice of a larger array would be copied.
        rotary: cos and sin of each batch row, or of one row for all.
        q_norm, k_norm: gamma, (D,) float32.
        eps: of both norms.
        H, Hk: query and key heads; the geometry must be supported.
    """
    B, T, width = projected.shape
    sizes = Geometry.of(rotary, q_norm, H, Hk)
    assert sizes.supported, f"not supported: {sizes}"
    assert width == sizes.width, f"{width} for {sizes}"
    cos, sin = rotary
    assert cos.shape == sin.shape and cos.shape[0] in (1, B) and cos.shape[2] == T, f"table {cos.shape} for {B} x {T}"
    q, k = fused.launch(
        "norm_rotary",
        inputs={
            "projected": projected, "cosines": cos, "sines": sin, "q_norm": q_norm, "k_norm": k_norm, "tokens": T,
            "tables": cos.shape[0], "epsilon": eps,
        },
        outputs={name: ((B, heads, T, sizes.D), projected.dtype) for name, heads in (("queries", H), ("keys", Hk))},
        template={
            "Element": projected.dtype, "QUERY_HEADS": H, "KEY_HEADS": Hk, "HEAD_DIM": sizes.D, "DIMS": sizes.dims,
        },
        grid=(SIMD, H + Hk, B * T),
        threadgroup=(SIMD, ROWS, 1),
    )  # fmt: skip
    return q, k


def plain_norm_rotary(
    projected: mx.array, rotary: Table, q_norm: mx.array, k_norm: mx.array, eps: float, H: int, Hk: int
) -> tuple[mx.array, mx.array]:
    """`norm_rotary` by MLX operations, for any sizes."""
    D = q_norm.shape[0]
    q, k, _ = mx.split(projected, [2 * H * D, (2 * H + Hk) * D], axis=-1)
    return _apart(q, k, rotary, q_norm, k_norm, eps)


def _apart(
    q: mx.array, k: mx.array, rotary: Table, q_norm: mx.array, k_norm: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """q (B, T, 2 H D) with gates, k (B, T, Hk D)."""
    B, T, _ = q.shape
    D = q_norm.shape[0]
    q = q.reshape(B, T, -1, 2 * D)[..., :D]
    k = k.reshape(B, T, -1, D).swapaxes(1, 2)
    return rotate(rms_norm(q, q_norm, eps).swapaxes(1, 2), rotary), rotate(rms_norm(k, k_norm, eps), rotary)


def rotate(x: mx.array, table: Table) -> mx.array:
    """Rotate the first dims of x (B, H, T, D), dim j with dim j + dims / 2, in float32. The other dims stay."""
    cos, sin = table
    half = cos.shape[-1]
    first, second, rest = mx.split(x, [half, 2 * half], axis=-1)
    return mx.concatenate([*_rotated(first, second, cos, sin), rest], axis=-1)


@compiled
def _rotated(first: mx.array, second: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    dtype = first.dtype
    first, second = first.astype(mx.float32), second.astype(mx.float32)
    return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)


# --- the choice ------------------------------------------------------------------------------------------------------


def queries_and_keys(
    products: Sequence[mx.array],
    split: Callable[[Sequence[mx.array]], Sequence[mx.array]],
    rotary: Table,
    q_norm: mx.array,
    k_norm: mx.array,
    eps: float,
    H: int,
    Hk: int,
) -> tuple[mx.array, mx.array]:
    """Projections to q (B, H, T, D) and k (B, Hk, T, D), by the kernel where it is enabled, else by operations.

    products: of the projections; `split` makes q with gates, k, v of them.
    """
    sizes, widths = Geometry.of(rotary, q_norm, H, Hk), [array.shape[-1] for array in products]
    if backend().fused_kernels and fits(widths, sizes) and self_check(sizes, products[0].dtype):
        return norm_rotary(products[0], rotary, q_norm, k_norm, eps, H, Hk)
    q, k, _ = split(products)
    return _apart(q, k, rotary, q_norm, k_norm, eps)


def fits(widths: Sequence[int], sizes: Geometry) -> bool:
    """Whether the kernel has these sizes, and q, k, v come as one product: it reads whole tokens."""
    return sizes.supported and list(widths) == [sizes.width]


@functools.cache
def self_check(sizes: Geometry, dtype: mx.Dtype) -> bool:
    """Whether the kernel agrees with its definition on this machine. Warns once if it does not."""
    return fused.agrees("norm_rotary", lambda: _cases(sizes, dtype))


def _cases(sizes: Geometry, dtype: mx.Dtype) -> Iterator[fused.Case]:
    """Two rows of 3 tokens, and one token with the longer cosines and sines of YaRN."""
    if not sizes.supported:
        raise ValueError(f"it does not support {sizes}")
    shapes = (2, 3, sizes.width), (sizes.D,), (sizes.D,), (2, 1, 3, sizes.dims // 2)
    tokens, q_norm, k_norm, angles = fused.normal_arrays(*shapes)
    for B, T, length in ((2, 3, 1.0), (1, 1, 1.1386)):
        rotary = length * mx.cos(3 * angles[:B, :, :T]), length * mx.sin(3 * angles[:B, :, :T])
        call = (tokens[:B, :T].astype(dtype), rotary, 1 + q_norm / 10, 1 + k_norm / 10, 1e-6, sizes.H, sizes.Hk)
        for name, ours, plain in zip("qk", norm_rotary(*call), plain_norm_rotary(*call), strict=True):
            yield name, ours, plain, fused.relative(fused.ROUNDING[dtype], plain)
