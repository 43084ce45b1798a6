"""Attention by tiles of queries: the same as all at once, and of bounded size."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.backend import CPU, CUDA, METAL, assume, backend
from mlx_qwen35.kernels import attention as kernel
from mlx_qwen35.kernels import cpu

TOLERANCE = 2e-6  # float32, values of the order of 1


def inputs(H: int, Hk: int, T: int, S: int, D: int) -> tuple[mx.array, mx.array, mx.array]:
    rng, shapes = np.random.default_rng(0), ((2, H, T, D), (2, Hk, S, D), (2, Hk, S, D))
    return tuple(mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)


def plain(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> np.ndarray:
    """Softmax attention by its definition, in float64. causal: the last query sees all keys, others one less each."""
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scale
    T, S = scores.shape[-2:]
    scores = np.where(np.tril(np.ones((T, S), bool), S - T), scores, -np.inf) if causal else scores
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


def error(a: mx.array, b: np.ndarray) -> float:
    return float(np.abs(np.array(a) - b).max())


@pytest.mark.parametrize("rows", [1, 7, 33, 1000])
@pytest.mark.parametrize(("H", "Hk", "T", "S", "D"), [(6, 2, 33, 33, 24), (5, 5, 40, 95, 16), (4, 1, 17, 60, 72)])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_any_size_equal_the_definition(monkeypatch, rows, H, Hk, T, S, D, causal):
    monkeypatch.setattr(cpu, "tile_rows", lambda *_: rows)
    q, k, v = inputs(H, Hk, T, S, D)
    expected = plain(q, k, v, D**-0.5, causal)
    assert error(kernel.attention(q, k, v, D**-0.5, causal), expected) < TOLERANCE


@pytest.mark.parametrize("T", [1, 15, 16])
def test_few_queries_and_many_take_ways_that_agree(T):
    q, k, v = inputs(4, 2, T, 50, 32)
    out = kernel.attention(q, k, v, 0.2, causal=T > 1)
    assert error(out, plain(q, k, v, 0.2, causal=True)) < TOLERANCE


@pytest.mark.parametrize("S", [1000, 18_440, 65_536, 1_000_000])
@pytest.mark.parametrize(("H", "D"), [(16, 64), (16, 72), (16, 256)])
def test_a_tile_keeps_to_its_budget(H, D, S):
    shape = (1, H, 4096, D)
    row = 4 * H * S
    assert cpu.tile_rows(shape, S) * row <= max(cpu.SCORE_BYTES, row)
    rows = kernel.tile_rows(shape, S, fused=False)
    if D in kernel.FUSED_HEAD_DIMS:
        assert rows * row * D <= max(kernel.LAUNCH_FLOPS, row * D)
    else:
        assert rows * row <= max(kernel.SCORE_BYTES, kernel.LEAST_ROWS * row)


def test_tiles_are_computed_one_after_the_other(monkeypatch):
    """Side by side, as MLX would, they would hold the scores of all: 8 times as much."""

    def peak(budget: int) -> int:
        monkeypatch.setattr(cpu, "SCORE_BYTES", budget)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(kernel.attention(q, k, v, 0.1, causal=False))
        return mx.get_peak_memory() - before

    q, k, v = inputs(4, 4, 1024, 2048, 16)
    mx.eval(q, k, v)
    whole = 4 * 2 * 4 * 1024 * 2048  # bytes of all scores
    assert peak(whole // 64) < whole / 4


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Attention believes that it has a GPU. The calls of MLX's own: queries, keys, and whether it was forced."""
    calls = []
    attend = mx.fast.scaled_dot_product_attention

    def recorded(q, k, v, *, scale, mask=None, force_fused=False):
        calls.append((q.shape[2], k.shape[2], force_fused))
        return attend(q, k, v, scale=scale, mask=mask)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", recorded)
    with assume(METAL):
        yield calls


@pytest.fixture
def small(monkeypatch):
    """Budgets in proportion to the arrays of these tests."""
    monkeypatch.setattr(kernel, "SCORE_BYTES", 64 << 10)
    monkeypatch.setattr(kernel, "LAUNCH_FLOPS", 2e8)


GPU_CASES = [  # H, T, S, D; one batch row: are scores many?
    (4, 100, 100, 256, True), (4, 64, 64, 256, False), (4, 65, 64, 256, True), (4, 9, 5000, 256, True),
    (4, 8, 5000, 256, False), (4, 1, 9000, 256, False), (4, 300, 400, 128, False), (4, 300, 400, 64, False),
    (4, 300, 400, 72, True), (16, 100, 2000, 256, True),
]  # fmt: skip


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize(("H", "T", "S", "D", "many"), GPU_CASES)
def test_scores_that_would_be_many_are_not_written_where_mlx_has_a_kernel(
    on_a_gpu, small, monkeypatch, H, T, S, D, many, holds
):
    monkeypatch.setattr(kernel, "fused_self_check", lambda *_: holds)
    q, k, v = (x[:1] for x in inputs(H, 2, T, S, D))
    kernel.attention(q, k, v, D**-0.5, causal=1 < T <= S)
    assert sum(rows for rows, _, _ in on_a_gpu) == T
    for rows, seen, forced in on_a_gpu:
        assert forced == (holds and many and rows > kernel.FEW_QUERIES)
        written = not forced and rows > kernel.FEW_QUERIES and D not in kernel.FUSED_HEAD_DIMS
        if written:
            assert 4 * H * rows * seen <= max(kernel.SCORE_BYTES, 4 * H * kernel.LEAST_ROWS * S)
        elif rows > 1:
            assert 4 * H * rows * seen * D <= kernel.LAUNCH_FLOPS


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize(("H", "D"), [(4, 256), (5, 72), (6, 64)])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_on_a_gpu_equal_the_definition(on_a_gpu, small, monkeypatch, H, D, causal, holds):
    monkeypatch.setattr(kernel, "fused_self_check", lambda *_: holds)
    monkeypatch.setattr(kernel, "LAUNCH_FLOPS", 4e7)
    T, S = 150, 260
    q, k, v = inputs(H, 1, T, S, D)
    out = kernel.attention(q, k, v, D**-0.5, causal)
    assert error(out, plain(q, k, v, D**-0.5, causal)) < TOLERANCE
    assert len(on_a_gpu) > 1


@pytest.mark.parametrize("S", [4096, 65_536, 262_144, 1_048_576])
def test_a_forced_launch_of_the_4b_keeps_to_its_operations(S):
    shape = (1, 16, 1024, 256)
    rows = kernel.tile_rows(shape, S, fused=True)
    assert 4 * 16 * S * rows * 256 <= kernel.LAUNCH_FLOPS < 4 * 16 * S * (rows + 1) * 256


@pytest.mark.parametrize("S", [1000, 262_144])
@pytest.mark.parametrize("T", [4, 32, 1024])
def test_bytes_of_scores_are_those_of_the_largest_tile(T, S):
    shape, row = (1, 16, T, 256), 16 * S
    assert kernel.score_bytes(shape, S, 4, "cpu") == 4 * 4 * row * min(T, cpu.tile_rows(shape, S))
    tiles = kernel.score_bytes(shape, S, 2, "tiles")
    assert tiles == 3 * 2 * row * min(T, kernel.tile_rows(shape, S, False))
    many = 4 * T * row > kernel.SCORE_BYTES
    assert kernel.score_bytes(shape, S, 2, "fused") == (0 if many else tiles)


# --- whether MLX's kernel may be asked for ---------------------------------------------------------------------------


@pytest.fixture
def self_check(monkeypatch):
    """(what MLX does when it is forced) -> the self_check of heads of 256, on a Mac."""
    attend = mx.fast.scaled_dot_product_attention

    def of(forced):
        def call(*arrays, force_fused=False, **options):
            return forced(attend, *arrays, **options) if force_fused else attend(*arrays, **options)

        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", call)
        with assume(METAL):
            return kernel.fused_self_check.__wrapped__(256, mx.float16)

    return of


def test_where_mlx_has_no_such_kernel_nothing_is_said(self_check):
    def refuse(*_, **__):
        raise ValueError("[scaled_dot_product_attention] force_fused: no fused kernel for these inputs")

    assert self_check(refuse) is False  # a warning would be an error


@pytest.mark.skipif(backend() != CPU, reason="MLX computes on a GPU")
def test_mlx_itself_refuses_to_be_forced_on_a_cpu():
    with assume(METAL):
        assert kernel.fused_self_check.__wrapped__(256, mx.float32) is False


def test_a_kernel_of_mlx_that_agrees_is_used(self_check):
    assert self_check(lambda attend, *arrays, **options: attend(*arrays, **options)) is True


@pytest.mark.parametrize("wrong", [1.05, float("nan")])
def test_a_kernel_of_mlx_that_disagrees_is_told_of_and_not_used(self_check, wrong):
    with pytest.warns(RuntimeWarning, match=r"attention without scores \(force_fused\) is switched off: its output"):
        assert self_check(lambda attend, *arrays, **options: wrong * attend(*arrays, **options)) is False


def test_a_kernel_of_mlx_that_does_not_compile_is_told_of(self_check):
    class Uncompiled:
        def astype(self, _):  # MLX compiles when something is computed
            raise RuntimeError("[metal::Device] Unable to load kernel steel_attention")

    with pytest.warns(RuntimeWarning, match="is switched off: .* Unable to load kernel"):
        assert self_check(lambda *_, **__: Uncompiled()) is False


def test_off_a_mac_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("it was called"))
    assert kernel.fused_self_check.__wrapped__(256, mx.float16) is False


@pytest.mark.parametrize(("on", "holds", "impl"), [(CPU, 1, "cpu"), (METAL, 1, "fused"), (CUDA, 0, "tiles")])
def test_attention_impl_follows_backend_and_self_check(monkeypatch, on, holds, impl):
    monkeypatch.setattr(kernel, "fused_self_check", lambda *_: bool(holds))
    with assume(on):
        assert kernel.attention_impl(256, mx.float16) == impl
