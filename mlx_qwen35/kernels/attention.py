"""Softmax attention with a bound on the bytes of its scores and on the time of a launch.

On a GPU MLX's kernels compute it. For many queries of heads of 256 MLX writes the scores to memory, which is faster (so
its authors), and here stays so while they are few. For more, MLX's kernel that keeps them on the chip is forced; where
MLX has none, the queries are cut into tiles. On the CPU MLX computes exp one score at a time, so cpu.py computes the
tiles, each over the keys that its queries attend to, which halves the work of a causal prompt.
"""

import functools
from collections.abc import Iterator

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import cpu, fused
from mlx_qwen35.kernels.by_hand import Arrays, by_hand
from mlx_qwen35.kernels.elementwise import exp
from mlx_qwen35.kernels.products import shortened

SCORE_BYTES = 16 << 20  # of float32 scores at a time, where MLX writes them to a GPU's memory
LEAST_ROWS = 16  # of a tile, since each tile reads all keys and values again
FUSED_HEAD_DIMS = (64, 80, 128)  # for which MLX writes no scores, however many queries
LAUNCH_FLOPS = 2e11  # of a launch that writes no scores: a tenth of a second on an M1
FEW_QUERIES = 8  # for which MLX writes no scores, whatever the heads


def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    """q (B, H, T, D), keys and values (B, Hk, S, D) -> (B, H, T, D); head h reads key head h // (H / Hk).

    causal: the queries are of the last T of S positions, and attend to the positions up to their own; else to all.
    """
    if backend().differentiates:
        forward = functools.partial(_attention, scale=scale, causal=causal)
        return by_hand(forward, functools.partial(_gradient, scale=scale, causal=causal), q, keys, values)
    return _attention(q, keys, values, scale, causal)


def _attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    T, S = q.shape[2], keys.shape[2]
    on_cpu = backend().tiles_attention
    forced = not on_cpu and _worth_forcing(q, S) and fused_self_check(q.shape[3], q.dtype)
    rows = cpu.tile_rows(q.shape, S) if on_cpu else tile_rows(q.shape, S, forced)
    plain = T < cpu.MANY_QUERIES or not on_cpu
    tiles: list[mx.array] = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        seen = S - T + stop if causal else S
        # In sequence: else MLX computes all tiles side by side, and holds the scores of all.
        queries = mx.depends(q[:, :, start:stop], tiles[-1:]) if tiles else q[:, :, start:stop]
        part = queries, keys[:, :, :seen], values[:, :, :seen]
        if plain:
            mask, force = "causal" if causal else None, forced and stop - start > FEW_QUERIES
            tiles.append(mx.fast.scaled_dot_product_attention(*part, scale=scale, mask=mask, force_fused=force))
        else:
            tiles.append(cpu.attention_tile(*part, scale, causal))
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)


def _gradient(primals: Arrays, dout: mx.array, out: mx.array, scale: float, causal: bool) -> Arrays:
    """The gradients of q, keys and values, in float32 tile by tile, each over the keys that its queries attend to.

    With P the softmax of a tile's scores: dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = dS K, dK = dS^T Q.
    """
    q, keys, values = primals
    (B, H, T, D), (Hk, S) = q.shape, keys.shape[1:3]
    rows = cpu.tile_rows(q.shape, S) if backend().tiles_attention else tile_rows(q.shape, S, False)
    k, v = keys.astype(mx.float32), values.astype(mx.float32)
    dk, dv = mx.zeros_like(k), mx.zeros_like(v)
    dq: list[mx.array] = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        n, seen = stop - start, S - T + stop if causal else S
        tiles = (x[:, :, start:stop].astype(mx.float32).reshape(B, Hk, -1, D) for x in (q * scale, dout, out))
        own, d_out, out_tile = mx.depends(list(tiles), [dk, dv, *dq[-1:]])
        scores = (own @ k[:, :, :seen].swapaxes(-1, -2)).reshape(B, Hk, -1, n, seen)
        if causal:
            scores = scores.at[..., seen - n :].add(mx.triu(mx.full((n, n), -mx.inf), 1))
        P = exp(scores - scores.max(-1, keepdims=True)).reshape(B, Hk, -1, seen)
        P = P / P.sum(-1, keepdims=True)
        dv = dv.at[:, :, :seen].add(P.swapaxes(-1, -2) @ d_out)
        dS = P * (d_out @ v[:, :, :seen].swapaxes(-1, -2) - (d_out * out_tile).sum(-1, keepdims=True))
        dk = dk.at[:, :, :seen].add(dS.swapaxes(-1, -2) @ own)
        dq.append((scale * (dS @ k[:, :, :seen])).reshape(B, H, n, D))
    gradients = (mx.concatenate(dq, axis=2), dk, dv)
    return [gradient.astype(primal.dtype) for gradient, primal in zip(gradients, primals, strict=True)]


def _worth_forcing(q: mx.array, S: int) -> bool:
    """Whether MLX would write so many scores that the slower kernel without them is worth it."""
    B, H, T, D = q.shape
    return D not in FUSED_HEAD_DIMS and T > FEW_QUERIES and 4 * B * H * T * S > SCORE_BYTES


def tile_rows(shape: tuple[int, ...], S: int, fused: bool) -> int:
    """Queries of (B, H, T, D) to a tile on a GPU, over S keys. fused: MLX is forced to write no scores."""
    B, H, _, D = shape
    row = 4 * B * H * S  # bytes of a query's scores; times D, the operations on them
    if fused or D in FUSED_HEAD_DIMS:
        return max(1, int(LAUNCH_FLOPS / (row * D)))
    return max(LEAST_ROWS, SCORE_BYTES // row)


def score_bytes(shape: tuple[int, ...], S: int, itemsize: int, impl: str) -> int:
    """Bytes that the scores of (B, H, T, D) over S keys, and what is made of them, take at a time.

    impl: "cpu", "fused" where `fused_self_check` holds, or "tiles".
    """
    B, H, T, D = shape
    if impl == "cpu":
        return 16 * B * H * S * min(T, cpu.tile_rows(shape, S))
    if D in FUSED_HEAD_DIMS or (impl == "fused" and 4 * B * H * T * S > SCORE_BYTES):
        return 0
    return 3 * itemsize * B * H * S * min(T, tile_rows(shape, S, fused=False))


def attention_impl(D: int, dtype: mx.Dtype) -> str:
    """How many queries over many keys are computed here: "cpu", "fused" or "tiles"."""
    if backend().tiles_attention:
        return "cpu"
    return "fused" if fused_self_check(D, dtype) else "tiles"


@functools.cache
def fused_self_check(D: int, dtype: mx.Dtype) -> bool:
    """Whether MLX has a kernel without scores for many queries of heads of D that agrees with the definition.

    Warns once if the kernel differs. Where MLX has none, tiles take its place, which are slower.
    """
    if not backend().fused_kernels:
        return False
    q, k, v = (x.astype(dtype) for x in fused.normal_arrays((1, 4, 40, D), (1, 2, 40, D), (1, 2, 40, D)))
    try:
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask="causal", force_fused=True)
    except ValueError:  # MLX has none for these heads on this machine
        return False

    def cases() -> Iterator[fused.Case]:
        digits = mx.float16 if dtype == mx.float32 and shortened() else dtype
        yield "output", out, definition(q, k, v), max(1e-4, 2 * fused.ROUNDING[digits])

    return fused.agrees("attention without scores (force_fused)", cases)


def definition(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal attention of the last T of S positions, q (1, H, T, D), k and v (1, Hk, S, D), scale D^-0.5.

    By float32 sums alone, since a machine may shorten matrix products.
    """
    k, v = (mx.repeat(x.astype(mx.float32), q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = (q.astype(mx.float32)[..., None, :] * k[:, :, None]).sum(-1) * q.shape[3] ** -0.5
    T, S = scores.shape[2:]
    weights = mx.softmax(scores + mx.triu(mx.full((T, S), -mx.inf), S - T + 1), axis=-1)
    return (weights[..., None] * v[:, :, None]).sum(-2)
