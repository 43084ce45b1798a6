"""Softmax attention whose scores never take more than a stated number of bytes, nor one launch more than a stated time.

MLX's own kernel does the work on a GPU, by tiles of queries. On the CPU that takes exp of every score one by one; there
the tiles are computed here, each with the keys that it sees, which also halves the work of a causal prompt.
"""

import mlx.core as mx

from mlx_qwen35.kernels.exponential import exp

SCORE_BYTES = 64 << 20  # of float32 scores at a time, where MLX writes them out on a GPU
LEAST_ROWS = 16  # of such a tile: each reads all keys and values again
CPU_SCORE_BYTES = 8 << 20  # and here, where what is made of them takes four times as much
FUSED_HEAD_DIMS = (64, 80, 128)  # of these MLX has a kernel for many queries that writes no scores
LAUNCH_FLOPS = 2e11  # of one fused launch: a tenth of a second on an M1
CPU_ROWS = 128  # queries of a tile on the CPU, whose scores then stay in its caches
MANY_QUERIES = 16  # from here on


def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """q (B, H, T, D), keys and values (B, Hk, S, D) -> (B, H, T, D); head h reads key head h // (H / Hk).

    mask: boolean (B, 1, T, S), "causal" for the last T of S positions, or None for all.
    """
    T, S = q.shape[2], keys.shape[2]
    rows = tile_rows(q.shape, S, mx.default_device() == mx.cpu)
    plain = T < MANY_QUERIES or mx.default_device() != mx.cpu or isinstance(mask, mx.array)
    tiles = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        seen = S - T + stop if mask == "causal" else S
        # One after the other: MLX would compute all tiles side by side, and hold the scores of all.
        queries = mx.depends(q[:, :, start:stop], tiles[-1:]) if tiles else q[:, :, start:stop]
        part = (queries, keys[:, :, :seen], values[:, :, :seen], scale)
        if plain:
            rule = mask[:, :, start:stop] if isinstance(mask, mx.array) else mask
            tiles.append(mx.fast.scaled_dot_product_attention(*part[:3], scale=scale, mask=rule))
        else:
            tiles.append(_tile(*part, causal=mask == "causal"))
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)


def tile_rows(shape: tuple[int, ...], S: int, on_cpu: bool) -> int:
    """How many queries of (B, H, T, D) go at a time over S keys."""
    B, H, _, D = shape
    row = 4 * B * H * S  # bytes of scores; and times D the operations on them
    if on_cpu:
        rows = min(CPU_ROWS, CPU_SCORE_BYTES // row)
    elif D in FUSED_HEAD_DIMS:
        rows = int(LAUNCH_FLOPS / (row * D))
    else:
        rows = max(LEAST_ROWS, SCORE_BYTES // row)
    return max(1, rows)


def _tile(q: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    """Some queries over all the given keys, of which, when causal, the last query sees all and each before one less."""
    B, H, T, D = q.shape
    Hk, S = keys.shape[1:3]
    rows = (q.astype(mx.float32) * scale).reshape(B, Hk, -1, D)
    scores = (rows @ keys.swapaxes(-1, -2)).reshape(B, Hk, -1, T, S)
    if causal:
        scores = scores + mx.triu(mx.full((T, S), -mx.inf), S - T + 1)
    weights = exp(scores - scores.max(-1, keepdims=True)).reshape(B, Hk, -1, S)
    out = (weights @ values) / weights.sum(-1, keepdims=True)
    return out.reshape(B, H, T, D).astype(q.dtype)
