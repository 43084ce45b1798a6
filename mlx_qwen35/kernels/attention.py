"""Causal attention of a prompt: MLX's own, except on the CPU, where that takes exp of every score one by one.

There it goes by blocks of queries, each with the keys up to its end, which also halves the work.
"""

import mlx.core as mx

from mlx_qwen35.kernels.exponential import exp

BLOCK = 128  # queries
MANY_QUERIES = 16  # from here on


def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """q (B, H, T, D), keys and values (B, Hk, S, D) -> (B, H, T, D); head h reads key head h // (H / Hk).

    mask: boolean (B, 1, T, S), "causal" for the last T of S positions, or None for all.
    """
    T = q.shape[2]
    if mask != "causal" or T < MANY_QUERIES or mx.default_device() != mx.cpu:
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    return _causal_blocks(q.astype(mx.float32) * scale, keys, values).astype(q.dtype)


def _causal_blocks(q: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    B, H, T, D = q.shape
    Hk, S = keys.shape[1:3]
    q = q.reshape(B, Hk, H // Hk, T, D)
    blocks = []
    for begin in range(0, T, BLOCK):
        rows = min(BLOCK, T - begin)
        columns = S - T + begin + rows
        scores = q[..., begin : begin + rows, :].reshape(B, Hk, -1, D) @ keys[:, :, :columns].swapaxes(-1, -2)
        hidden = mx.triu(mx.full((rows, columns), -mx.inf), columns - rows + 1)
        scores = scores.reshape(B, Hk, -1, rows, columns) + hidden
        weights = exp(scores - scores.max(-1, keepdims=True)).reshape(B, Hk, -1, columns)
        out = (weights @ values[:, :, :columns]) / weights.sum(-1, keepdims=True)
        blocks.append(out.reshape(B, H, rows, D))
    return mx.concatenate(blocks, axis=2)
