"""Norm and rotary embedding of queries and keys in one launch, run by the emulator, give the operations' answer."""

import warnings
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from kernels.emulator import emulate, missing
from kernels.emulator import emulated as emulation

from mlx_qwen35.config import RopeConfig
from mlx_qwen35.kernels import metal, norm_rotary
from mlx_qwen35.kernels.norm_rotary import Geometry, plain_norm_rotary, queries_and_keys, rotate, verdict
from mlx_qwen35.layers import RMSNorm, Rotary

emulated = pytest.mark.skipif(bool(missing()), reason=missing())
EPS = 1e-6
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
STEP = {mx.float32: 1e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}  # of 16 bits, from 1 to the next number
SIZES = [  # D with the dims that turn: whole simdgroups of pairs, parts of one, one and a part; with and without a rest
    (32, 16), (32, 32), (64, 18), (64, 64), (96, 16), (96, 70), (96, 96), (256, 16), (256, 64), (256, 100), (256, 256),
]  # fmt: skip
H, HK = 5, 2  # 7 in all: the last threadgroup of a token is not full
ODD = (96, 70)


@dataclass(frozen=True)
class Case:
    """One call: projections (B, T, [q gate] x H, k, v), cos and sin, gammas."""

    projected: mx.array
    rotary: tuple[mx.array, mx.array]
    q_norm: mx.array
    k_norm: mx.array

    def call(self) -> tuple:
        return (self.projected, self.rotary, self.q_norm, self.k_norm, EPS, H, HK)

    @property
    def sizes(self) -> Geometry:
        return Geometry.of(self.rotary, self.q_norm, H, HK)


def case(D: int, dims: int, T: int, dtype: mx.Dtype, B: int = 1, scale: float = 1.0) -> Case:
    """Every batch row at positions of its own, the three axes apart."""
    rng = np.random.default_rng(T + B + D + dims)
    projected = mx.array((scale * rng.normal(size=(B, T, 2 * (H + HK) * D))).astype(np.float32)).astype(dtype)
    norms = [mx.array((1 + 0.3 * rng.normal(size=D)).astype(np.float32)) for _ in range(2)]
    sections = (dims // 2 - 4, 2, 2)
    table = Rotary(RopeConfig(theta=1e4, dims=dims, sections=sections)).table(mx.array(rng.integers(0, 999, (3, B, T))))
    return Case(projected, table, *norms)


def run(given: Case, **options) -> tuple[mx.array, mx.array]:
    return emulate(lambda: norm_rotary.norm_rotary(*given.call()), **options)[0]


def same(ours, theirs) -> bool:
    return all(mx.array_equal(a, b).item() for a, b in zip(ours, theirs, strict=True))


def part(given: Case, b: slice, t: slice) -> Case:
    cos, sin = (table[b, :, t] for table in given.rotary)
    return Case(given.projected[b, t], (cos, sin), given.q_norm, given.k_norm)


def unequal(ours, want, dims: int) -> float:
    """Share of the numbers that are not equal; each within a step, where turned: a step of the larger of its pair."""
    shares = []
    for a, b in zip(ours, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = (np.array(x.astype(mx.float32)) for x in (a, b))
        size, half = np.abs(b), dims // 2
        pair = np.hypot(b[..., :half], b[..., half:dims])
        size[..., :half] = size[..., half:dims] = pair
        assert (np.abs(a - b) <= STEP[ours[0].dtype] * size).all(), f"{np.nanmax(np.abs(a - b) / size):.1e}"
        shares.append((a != b).mean())
    return max(shares)


# --- the operations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_give_the_bits_of_the_layers_parts(dtype):
    """RMSNorm of layers.py, then rotate, put together as the attention layer does."""
    given = case(*ODD, 17, dtype, B=3)
    B, T, D = 3, 17, ODD[0]
    q, k, _ = mx.split(given.projected, [2 * H * D, (2 * H + HK) * D], axis=-1)
    q, _ = mx.split(q.reshape(B, T, H, -1), 2, axis=-1)
    k = k.reshape(B, T, -1, D).swapaxes(1, 2)
    q = rotate(RMSNorm(given.q_norm, EPS)(q).swapaxes(1, 2), given.rotary)
    k = rotate(RMSNorm(given.k_norm, EPS)(k), given.rotary)
    assert same(plain_norm_rotary(*given.call()), (q, k))


# --- the answer ------------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize(("D", "dims"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gives_what_the_operations_give(dtype, D, dims):
    for T, B in ((1, 1), (2, 3), (17, 1), (17, 3)):
        given = case(D, dims, T, dtype, B)
        unequal(run(given), plain_norm_rotary(*given.call()), dims)


@emulated
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_kernel_rounds_where_the_operations_round(dtype):
    """Without the first rounding a third of the numbers differ, each by no more than a step.

    With it 0.1 % do: those so near the middle of a step that the last bit of a float32 decides.
    """
    given = case(64, 64, 17, dtype, B=3)
    assert unequal(run(given), plain_norm_rotary(*given.call()), 64) < 1e-2


@emulated
def test_epsilon_counts_where_everything_is_small():
    given = case(*ODD, 3, mx.float32, scale=1e-3)
    unequal(run(given), plain_norm_rotary(*given.call()), ODD[1])


# --- the same bits ---------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_lanes_in_backward_order_give_the_same_bits(dtype):
    given = case(*ODD, 5, dtype, B=2)
    assert same(run(given, order="backward"), run(given))


@emulated
def test_a_token_has_the_same_bits_alone_and_among_others():
    given = case(*ODD, 5, mx.float16, B=3)
    q, k = run(given)
    for b, t in ((0, 0), (1, 3), (2, 4)):
        b, t = slice(b, b + 1), slice(t, t + 1)
        assert same(run(part(given, b, t)), (q[b, :, t], k[b, :, t]))


@emulated
def test_one_table_serves_all_batch_rows():
    given = case(*ODD, 4, mx.float16, B=3)
    cos, sin = (table[:1] for table in given.rotary)
    one = Case(given.projected, (cos, sin), given.q_norm, given.k_norm)
    spread = tuple(mx.broadcast_to(table, (3, *table.shape[1:])) for table in one.rotary)
    assert same(run(one), run(Case(given.projected, spread, given.q_norm, given.k_norm)))


@emulated
def test_gates_and_values_are_not_read():
    given = case(*ODD, 2, mx.float16)
    D = ODD[0]
    inner = mx.arange(given.projected.shape[-1])
    used = ((inner < 2 * H * D) & (inner % (2 * D) < D)) | ((inner >= 2 * H * D) & (inner < (2 * H + HK) * D))
    spoiled = mx.where(used, given.projected, mx.nan).astype(mx.float16)
    assert same(run(Case(spoiled, given.rotary, given.q_norm, given.k_norm)), run(given))


# --- police and traffic ----------------------------------------------------------------------------------------------


@emulated
def test_police_finds_nothing_and_each_number_is_read_once():
    given, (D, dims) = case(*ODD, 3, mx.bfloat16, B=2), ODD
    _, report = emulate(lambda: norm_rotary.norm_rotary(*given.call()), police=True)
    assert not report.faults and not report.warnings
    (launch,) = report.launches
    rows = (H + HK) * 2 * 3
    assert (launch.barriers, launch.threadgroup_memory) == (0, 0)
    assert launch.collectives == 5 * rows
    assert launch.buffers["projected"].read == launch.buffers["projected"].unique_read == 2 * D * rows
    assert launch.buffers["cosines"].read == launch.buffers["sines"].read == 4 * dims // 2 * rows
    assert launch.device().written == 2 * D * rows


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_mac(monkeypatch):
    """Kernels are taken to be available, and are emulated; the report of their launches."""
    monkeypatch.setattr(metal, "available", lambda: True)
    verdict.cache_clear()
    with emulation("forward", False) as report:
        yield report
    verdict.cache_clear()


def chosen(given: Case, products=None) -> tuple[mx.array, mx.array]:
    D = given.sizes.D

    def split(products):
        return mx.split(mx.concatenate(products, axis=-1), [2 * H * D, (2 * H + HK) * D], axis=-1)

    return queries_and_keys([given.projected] if products is None else products, split, *given.call()[1:])


@emulated
@pytest.mark.parametrize("sizes", [Geometry(H, HK, *ODD), Geometry(16, 4, 256, 64)], ids=["odd", "4B"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_passes_its_check_at_load(as_on_a_mac, dtype, sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdict(sizes, dtype)


@emulated
def test_the_kernel_runs_where_it_is_available_and_agrees(as_on_a_mac):
    given = case(*ODD, 2, mx.float16)
    assert verdict(given.sizes, mx.float16)
    launches = len(as_on_a_mac.launches)
    unequal(chosen(given), plain_norm_rotary(*given.call()), ODD[1])
    assert len(as_on_a_mac.launches) == launches + 1


@emulated
@pytest.mark.parametrize(
    ("right", "wrong", "name"),
    [
        ("rsqrt(", "sqrt(", "q"),
        ("fma(b, c, a * s)", "fma(b, c, -(a * s))", "q"),
        ("-(b * s)", "b * s", "q"),
        ("gamma[j + HALF]", "gamma[j]", "q"),
        ("is_query ? q_norm : k_norm", "q_norm", "k"),
        ("is_query ? 2 * head :", "is_query ? head :", "q"),
        ("tables == 1 ? 0 : batch", "0", "q"),
        ("other = 16", "other = 8", "q"),
        ("rest[n], rest[n], squares", "rest[n], 0.0f, squares", "q"),
        ("row - batch * T", "0", "q"),
    ],
)
def test_a_kernel_that_disagrees_is_switched_off_with_a_warning(as_on_a_mac, monkeypatch, right, wrong, name):
    text = metal.source("norm_rotary")
    assert right in text
    monkeypatch.setattr(metal, "source", lambda _: text.replace(right, wrong))
    metal._kernel.cache_clear()
    given = case(*ODD, 2, mx.float32)
    try:
        with pytest.warns(RuntimeWarning, match=f"norm_rotary is switched off: its {name} differs"):
            assert not verdict(given.sizes, mx.float32)
        launches = len(as_on_a_mac.launches)
        assert same(chosen(given), plain_norm_rotary(*given.call()))
        assert len(as_on_a_mac.launches) == launches
    finally:
        metal._kernel.cache_clear()


def test_a_kernel_that_does_not_compile_is_switched_off_with_a_warning(monkeypatch):
    def refused(*_):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: ...")

    monkeypatch.setattr(metal, "launch", refused)
    verdict.cache_clear()
    with pytest.warns(RuntimeWarning, match="is switched off: .* Unable to build metal library from source. MLX"):
        assert not verdict(Geometry(H, HK, *ODD), mx.float32)
    verdict.cache_clear()


@pytest.mark.parametrize("sizes", [(48, 16), (96, 98), (20, 20)])
def test_sizes_that_do_not_fit_have_no_plan(sizes):
    assert not Geometry(H, HK, *sizes).planned


def refused(*_):
    pytest.fail("the kernel was launched")


@pytest.mark.parametrize(("D", "dims"), [(48, 16), ODD], ids=["no plan", "off a Mac"])
def test_without_a_plan_or_a_mac_the_operations_run(monkeypatch, D, dims):
    monkeypatch.setattr(metal, "available", lambda: D == 48)
    monkeypatch.setattr(metal, "launch", refused)
    given = case(D, dims, 2, mx.bfloat16, B=2)
    assert same(chosen(given), plain_norm_rotary(*given.call()))


def test_projections_that_come_apart_are_read_by_operations(monkeypatch):
    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setattr(metal, "launch", refused)
    given = case(*ODD, 2, mx.bfloat16, B=2)
    products = mx.split(given.projected, [2 * H * ODD[0]], axis=-1)
    assert same(chosen(given, products), plain_norm_rotary(*given.call()))
