"""Softmax attention whose scores never take more than a stated number of bytes, nor one launch more than a stated time.

MLX's own kernels do the work on a GPU. For many queries of heads of 256 it writes the scores out unless told not to:
that is done where they take few bytes, being faster (so its authors); where they would take many, the kernel that keeps
them on the chip is asked for, or where there is none, tiles of queries are taken. On the CPU MLX takes exp of every
score one by one; there the tiles are computed here, each with the keys that it sees, which also halves the work of a
causal prompt.
"""

import functools

import mlx.core as mx

from mlx_qwen35.kernels import metal
from mlx_qwen35.kernels.exponential import exp
from mlx_qwen35.kernels.products import shortened

SCORE_BYTES = 16 << 20  # of float32 scores at a time, where MLX writes them out on a GPU
LEAST_ROWS = 16  # of such a tile: each reads all keys and values again
CPU_SCORE_BYTES = 8 << 20  # and here, where what is made of them takes four times as much
FUSED_HEAD_DIMS = (64, 80, 128)  # of these MLX by itself writes no scores, however many queries
LAUNCH_FLOPS = 2e11  # of one launch that writes no scores: a tenth of a second on an M1
FEW_QUERIES = 8  # up to here it writes none for any heads
CPU_ROWS = 128  # queries of a tile on the CPU, whose scores then stay in its caches
MANY_QUERIES = 16  # from here on


def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """q (B, H, T, D), keys and values (B, Hk, S, D) -> (B, H, T, D); head h reads key head h // (H / Hk).

    mask: boolean (B, 1, T, S), "causal" for the last T of S positions, or None for all.
    """
    T, S = q.shape[2], keys.shape[2]
    on_cpu = mx.default_device() == mx.cpu
    forced = not on_cpu and _worth_forcing(q, S) and fused_verdict(q.shape[3], q.dtype)
    rows = cpu_tile_rows(q.shape, S) if on_cpu else tile_rows(q.shape, S, forced)
    plain = T < MANY_QUERIES or not on_cpu or isinstance(mask, mx.array)
    tiles = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        seen = S - T + stop if mask == "causal" else S
        # One after the other: MLX would compute all tiles side by side, and hold the scores of all.
        queries = mx.depends(q[:, :, start:stop], tiles[-1:]) if tiles else q[:, :, start:stop]
        part = (queries, keys[:, :, :seen], values[:, :, :seen], scale)
        if plain:
            rule = mask[:, :, start:stop] if isinstance(mask, mx.array) else mask
            force = {"force_fused": True} if forced and stop - start > FEW_QUERIES else {}
            tiles.append(mx.fast.scaled_dot_product_attention(*part[:3], scale=scale, mask=rule, **force))
        else:
            tiles.append(_tile(*part, causal=mask == "causal"))
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)


def _worth_forcing(q: mx.array, S: int) -> bool:
    """Whether MLX would write out so many scores that the kernel without them is worth its lower speed."""
    B, H, T, D = q.shape
    return D not in FUSED_HEAD_DIMS and T > FEW_QUERIES and 4 * B * H * T * S > SCORE_BYTES


def tile_rows(shape: tuple[int, ...], S: int, fused: bool) -> int:
    """How many queries of (B, H, T, D) go at a time over S keys on a GPU; fused: no scores are written, by force."""
    B, H, _, D = shape
    row = 4 * B * H * S  # bytes of scores; and times D the operations on them
    if fused or D in FUSED_HEAD_DIMS:
        return max(1, int(LAUNCH_FLOPS / (row * D)))
    return max(LEAST_ROWS, SCORE_BYTES // row)


def cpu_tile_rows(shape: tuple[int, ...], S: int) -> int:
    """How many queries of (B, H, T, D) go at a time over S keys on the CPU."""
    B, H, _, _ = shape
    return max(1, min(CPU_ROWS, CPU_SCORE_BYTES // (4 * B * H * S)))


def score_bytes(shape: tuple[int, ...], S: int, itemsize: int, way: str) -> int:
    """Bytes that the scores of (B, H, T, D) over S keys, and what is made of them, take at a time.

    way: "cpu", "fused" where `fused_verdict` holds, or "tiles".
    """
    B, H, T, D = shape
    if way == "cpu":
        return 16 * B * H * S * min(T, cpu_tile_rows(shape, S))
    if D in FUSED_HEAD_DIMS or (way == "fused" and 4 * B * H * T * S > SCORE_BYTES):
        return 0
    return 3 * itemsize * B * H * S * min(T, tile_rows(shape, S, fused=False))


def attention_way(D: int, dtype: mx.Dtype) -> str:
    """How many queries over many keys are computed here: "cpu", "fused" or "tiles"."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "fused" if fused_verdict(D, dtype) else "tiles"


@functools.cache
def fused_verdict(D: int, dtype: mx.Dtype) -> bool:
    """Whether MLX has a kernel for many queries of heads of D that writes no scores, and it agrees with the definition.

    Where there is none, tiles are taken, and nothing is lost but some speed; one that disagrees is told of.
    """
    if not metal.available():
        return False
    draw = functools.partial(mx.random.normal, stream=mx.cpu)
    q, k, v = (draw((1, heads, 40, D), key=mx.random.key(i)).astype(dtype) for i, heads in enumerate((4, 2, 2)))
    try:
        fused = mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask="causal", force_fused=True)
    except ValueError:  # there is none for these heads on this machine
        return False
    return metal.check("of attention without scores (force_fused)", lambda: _disagreement(fused, _definition(q, k, v)))


def _definition(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal attention of (1, H, T, D) by sums in float32: a matrix product's digits would be the machine's choice."""
    k, v = (mx.repeat(x.astype(mx.float32), q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = (q.astype(mx.float32)[..., None, :] * k[:, :, None]).sum(-1) * q.shape[3] ** -0.5
    weights = mx.softmax(scores + mx.triu(mx.full(scores.shape[2:], -mx.inf), 1), axis=-1)
    return (weights[..., None] * v[:, :, None]).sum(-2)


def _disagreement(ours: mx.array, theirs: mx.array) -> str:
    digits = mx.float16 if ours.dtype == mx.float32 and shortened() else ours.dtype  # its products' too, then
    step = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3.2e-2}[digits]
    error = mx.abs(ours.astype(mx.float32) - theirs).max().item()
    return "" if error <= step else f"it differs from the definition by {error:.1e}"  # NaN too


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
