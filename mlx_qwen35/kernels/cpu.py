"""For the CPU backend alone: exp of many elements, attention over many queries, and the sizes at which each pays.

MLX's CPU backend computes exp one element at a time, about 20 ns each: in prefill the sigmoids took longer than the
matrix products. It vectorises sums, products and conversions, 0.15 ns each, so exp is made of those. They run over one
piece of the elements after the other: MLX takes each result's memory from the system, which clears the pages of large
results first, and that costs several times the arithmetic.
"""

import math
from collections.abc import Callable, Sequence

import mlx.core as mx

MANY = 1 << 14  # elements from which a dozen vectorised passes beat one of exp
PIECE = 1 << 18  # elements that stay in the caches
SCORE_BYTES = 8 << 20  # of float32 scores at a time; with all that is computed of them, four times as much
TILE_ROWS = 128  # queries of a tile whose scores stay in the caches
MANY_QUERIES = 16  # from here on attention is computed in tiles
# Dequantizing a matrix costs as much as seven rows of a quantized product. With a fast BLAS it pays from 8 rows on (64
# rows: 7.7 times faster), with the reference BLAS of the Linux wheel never quite (16 rows: 1.3 times slower, 64: 1.06).
# Measured: (rows, 2560) by (9216, 2560), 4 bit, two cores.
MANY_ROWS = 12  # between the two
UNPACKED = 1 << 25  # dequantized elements at a time: 134 MB in float32

_ROUND = 1.5 * 2.0**23  # x + _ROUND has no bits for a fraction, and holds the integer in its lowest bits
_TERMS = (0.00132647272, 0.00967151281, 0.05550733745, 0.24022242083, 0.69314697760, 1.0)  # of 2^f, within 1e-7


def exp(x: mx.array) -> mx.array:
    """exp(x) of x's dtype. For many float32 elements within 4e-6 of it, and clipped to 2^-126..2^126."""
    return _by_pieces(lambda x: _exp2(x * math.log2(math.e)), x) if _many(x) else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)) of x's dtype, within 2e-7."""
    return _by_pieces(lambda x: 1.0 / _one_plus_exp(x), x) if _many(x) else mx.sigmoid(x)


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x) of x's dtype."""
    return _by_pieces(lambda x: x / _one_plus_exp(x), x) if _many(x) else x * mx.sigmoid(x)


def _many(x: mx.array) -> bool:
    return x.size >= MANY and x.dtype == mx.float32


def _by_pieces(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    return by_pieces(lambda piece: [function(piece)], x)[0]


def by_pieces(function: Callable[..., Sequence[mx.array]], *arrays: mx.array) -> Sequence[mx.array]:
    """function(*arrays), elementwise on arrays of one shape, over one piece of their elements after the other."""
    if arrays[0].size <= PIECE:
        return function(*arrays)
    done: list[Sequence[mx.array]] = []
    for pieces in zip(*(mx.split(x.reshape(-1), range(PIECE, x.size, PIECE)) for x in arrays), strict=True):
        # In sequence: else MLX does the first step of all pieces, then the second, and none stays in the caches.
        done.append(function(*(mx.depends(list(pieces), list(done[-1])) if done else pieces)))
    return [mx.concatenate(list(parts)).reshape(arrays[0].shape) for parts in zip(*done, strict=True)]


def _one_plus_exp(x: mx.array) -> mx.array:
    """1 + exp(-x)"""
    return 1.0 + _exp2(x * -math.log2(math.e))


def _exp2(x: mx.array) -> mx.array:
    """2^x as 2^n 2^f, with n the nearest integer, added to the bits of the exponent."""
    x = mx.clip(x, -126.0, 126.0)
    rounded = x + _ROUND
    f = x - (rounded - _ROUND)
    power = f * _TERMS[0] + _TERMS[1]
    for term in _TERMS[2:]:
        power = power * f + term
    return (power.view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32)


def tile_rows(shape: tuple[int, ...], S: int) -> int:
    """Queries of (B, H, T, D) to a tile, over S keys."""
    B, H, _, _ = shape
    return max(1, min(TILE_ROWS, SCORE_BYTES // (4 * B * H * S)))


def attention_tile(q: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    """Queries (B, H, T, D) over S keys. causal: the last query attends to all keys, each before it to one fewer."""
    B, H, T, D = q.shape
    Hk, S = keys.shape[1:3]
    rows = (q.astype(mx.float32) * scale).reshape(B, Hk, -1, D)
    scores = (rows @ keys.swapaxes(-1, -2)).reshape(B, Hk, -1, T, S)
    if causal:
        scores = scores.at[..., S - T :].add(mx.triu(mx.full((T, T), -mx.inf), 1))  # in place
    weights = exp(scores - scores.max(-1, keepdims=True)).reshape(B, Hk, -1, S)
    out = (weights @ values) / weights.sum(-1, keepdims=True)
    return out.reshape(B, H, T, D).astype(q.dtype)
