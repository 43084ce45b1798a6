"""Attention by tiles of queries: the same as all at once, and of bounded size."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels import attention as kernel

TOLERANCE = 2e-6  # float32, values of the order of 1


def inputs(H: int, Hk: int, T: int, S: int, D: int) -> tuple[mx.array, mx.array, mx.array]:
    rng, shapes = np.random.default_rng(0), ((2, H, T, D), (2, Hk, S, D), (2, Hk, S, D))
    return tuple(mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)


def plain(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: np.ndarray | None) -> np.ndarray:
    """Softmax attention by its definition, in float64."""
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scale
    scores = scores if mask is None else np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


def error(a: mx.array, b: np.ndarray) -> float:
    return float(np.abs(np.array(a) - b).max())


@pytest.mark.parametrize("rows", [1, 7, 33, 1000])
@pytest.mark.parametrize(("H", "Hk", "T", "S", "D"), [(6, 2, 33, 33, 24), (5, 5, 40, 95, 16), (4, 1, 17, 60, 72)])
@pytest.mark.parametrize("mask", [None, "causal", "given"])
def test_tiles_of_any_size_equal_the_definition(monkeypatch, rows, H, Hk, T, S, D, mask):
    monkeypatch.setattr(kernel, "tile_rows", lambda *_: rows)
    q, k, v = inputs(H, Hk, T, S, D)
    visible = np.tril(np.ones((T, S), bool), S - T)
    if mask == "given":
        visible = np.random.default_rng(1).random((2, 1, T, S)) < 0.5
        visible[..., 0] = True
    given = mx.array(visible) if mask == "given" else mask
    expected = plain(q, k, v, D**-0.5, None if mask is None else visible)
    assert error(kernel.attention(q, k, v, D**-0.5, given), expected) < TOLERANCE


@pytest.mark.parametrize("T", [1, 15, 16])
def test_few_queries_and_many_take_ways_that_agree(T):
    q, k, v = inputs(4, 2, T, 50, 32)
    visible = np.tril(np.ones((T, 50), bool), 50 - T)
    out = kernel.attention(q, k, v, 0.2, None if T == 1 else "causal")
    assert error(out, plain(q, k, v, 0.2, visible)) < TOLERANCE


@pytest.mark.parametrize("S", [1000, 18_440, 65_536, 1_000_000])
@pytest.mark.parametrize(("H", "D"), [(16, 64), (16, 72), (16, 256)])
def test_a_tile_keeps_to_its_budget(H, D, S):
    shape = (1, H, 4096, D)
    row = 4 * H * S
    assert kernel.tile_rows(shape, S, on_cpu=True) * row <= max(kernel.CPU_SCORE_BYTES, row)
    rows = kernel.tile_rows(shape, S, on_cpu=False)
    if D in kernel.FUSED_HEAD_DIMS:
        assert rows * row * D <= max(kernel.LAUNCH_FLOPS, row * D)
    else:
        assert rows * row <= max(kernel.SCORE_BYTES, kernel.LEAST_ROWS * row)


def test_tiles_are_computed_one_after_the_other(monkeypatch):
    """Side by side, as MLX would, they would hold the scores of all: 8 times as much."""

    def peak(budget: int) -> int:
        monkeypatch.setattr(kernel, "CPU_SCORE_BYTES", budget)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(kernel.attention(q, k, v, 0.1, None))
        return mx.get_peak_memory() - before

    q, k, v = inputs(4, 4, 1024, 2048, 16)
    mx.eval(q, k, v)
    whole = 4 * 2 * 4 * 1024 * 2048  # bytes of all scores
    assert peak(whole // 64) < whole / 4
