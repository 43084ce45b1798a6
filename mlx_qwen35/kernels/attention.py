"""Softmax attention whose scores never take more than a stated number of bytes, nor one launch more than a stated time.

MLX's own kernels do the work on a GPU. For many queries of heads of 256 it writes the scores out unless told not to:
that is done where they take few bytes, being faster (so its authors); where they would take many, the kernel that keeps
them on the chip is asked for, or where there is none, tiles of queries are taken. On the CPU MLX takes exp of every
score one by one; there the tiles are computed here, each with the keys that it sees, which also halves the work of a
causal prompt.
"""

import functools
from collections.abc import Iterator

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import cpu
from mlx_qwen35.kernels.fused import Case, agrees
from mlx_qwen35.kernels.products import shortened

SCORE_BYTES = 16 << 20  # of float32 scores at a time, where MLX writes them out on a GPU
LEAST_ROWS = 16  # of such a tile: each reads all keys and values again
FUSED_HEAD_DIMS = (64, 80, 128)  # of these MLX by itself writes no scores, however many queries
LAUNCH_FLOPS = 2e11  # of one launch that writes no scores: a tenth of a second on an M1
FEW_QUERIES = 8  # up to here it writes none for any heads


def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """q (B, H, T, D), keys and values (B, Hk, S, D) -> (B, H, T, D); head h reads key head h // (H / Hk).

    mask: boolean (B, 1, T, S), "causal" for the last T of S positions, or None for all.
    """
    T, S = q.shape[2], keys.shape[2]
    on_cpu = backend().tiles_attention
    forced = not on_cpu and _worth_forcing(q, S) and fused_self_check(q.shape[3], q.dtype)
    rows = cpu.tile_rows(q.shape, S) if on_cpu else tile_rows(q.shape, S, forced)
    plain = T < cpu.MANY_QUERIES or not on_cpu or isinstance(mask, mx.array)
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
            tiles.append(cpu.attention_tile(*part, causal=mask == "causal"))
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
    """Whether MLX has a kernel for many queries of heads of D that writes no scores, and it agrees with the definition.

    Where there is none, tiles are taken, and nothing is lost but some speed; one that disagrees is told of.
    """
    if not backend().fused_kernels:
        return False
    draw = functools.partial(mx.random.normal, stream=mx.cpu)
    q, k, v = (draw((1, heads, 40, D), key=mx.random.key(i)).astype(dtype) for i, heads in enumerate((4, 2, 2)))
    try:
        fused = mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask="causal", force_fused=True)
    except ValueError:  # there is none for these heads on this machine
        return False

    def cases() -> Iterator[Case]:
        digits = mx.float16 if dtype == mx.float32 and shortened() else dtype  # its products' too, then
        step = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3.2e-2}[digits]
        yield "output", fused, _definition(q, k, v), step

    return agrees("attention without scores (force_fused)", cases)


def _definition(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal attention of (1, H, T, D) by sums in float32: a matrix product's digits would be the machine's choice."""
    k, v = (mx.repeat(x.astype(mx.float32), q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = (q.astype(mx.float32)[..., None, :] * k[:, :, None]).sum(-1) * q.shape[3] ** -0.5
    weights = mx.softmax(scores + mx.triu(mx.full(scores.shape[2:], -mx.inf), 1), axis=-1)
    return (weights[..., None] * v[:, :, None]).sum(-2)
