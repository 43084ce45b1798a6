"""Norm and rotary embedding of queries and keys in one launch, run by the emulator, give the operations' answer."""

import warnings
from dataclasses import replace

import mlx.core as mx
import pytest
from kernels.backends import EMULATED, OPERATIONS
from kernels.emulator import emulate, missing
from kernels.emulator import emulated as emulation
from kernels.rotary_cases import DTYPES, EPS, ODD, WHOLE, Case, case, differences, unequal

from mlx_qwen35.backend import assume
from mlx_qwen35.kernels import fused
from mlx_qwen35.kernels.norm_rotary import Geometry, queries_and_keys, rotate, self_check
from mlx_qwen35.model.layers import RMSNorm

emulated = pytest.mark.skipif(bool(missing()), reason=missing())
H, HK = ODD.H, ODD.Hk
SIZES = [  # D with the dims that turn: whole simdgroups of pairs, parts of one, one and a part; with and without a rest
    (32, 16), (32, 32), (64, 18), (64, 64), (96, 16), (96, 70), (96, 96), (256, 16), (256, 64), (256, 100), (256, 256),
]  # fmt: skip


def run(given: Case, **options) -> tuple[mx.array, mx.array]:
    return emulate(given.launch, **options)[0]


def assert_close(given: Case) -> None:
    found = differences(run(given), given.plain(), given.sizes.dims)
    assert not found, found


def same(ours, theirs) -> bool:
    return all(mx.array_equal(a, b).item() for a, b in zip(ours, theirs, strict=True))


# --- the operations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_give_the_bits_of_the_layers_parts(dtype):
    """RMSNorm of layers.py, then rotate, put together as the attention layer does."""
    given = case(ODD, 17, dtype, B=3)
    B, T, D = 3, 17, ODD.D
    q, k, _ = mx.split(given.projected, [2 * H * D, (2 * H + HK) * D], axis=-1)
    q, _ = mx.split(q.reshape(B, T, H, -1), 2, axis=-1)
    k = k.reshape(B, T, -1, D).swapaxes(1, 2)
    q = rotate(RMSNorm(given.q_norm, EPS)(q).swapaxes(1, 2), given.rotary)
    k = rotate(RMSNorm(given.k_norm, EPS)(k), given.rotary)
    assert same(given.plain(), (q, k))


# --- the answer ------------------------------------------------------------------------------------------------------


@pytest.mark.core(4)
@emulated
@pytest.mark.parametrize(("D", "dims"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gives_what_the_operations_give(dtype, D, dims):
    for T, B in ((1, 1), (2, 3), (17, 1), (17, 3)):
        assert_close(case(Geometry(H, HK, D, dims), T, dtype, B))


@emulated
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_kernel_rounds_where_the_operations_round(dtype):
    """Without the first rounding a third of the numbers differ, each by no more than a step.

    With it 0.1 % do: those so near the middle of a step that the last bit of a float32 decides.
    """
    given = case(Geometry(H, HK, 64, 64), 17, dtype, B=3)
    assert_close(given)
    assert unequal(run(given), given.plain()) < 1e-2


@emulated
def test_epsilon_counts_where_everything_is_small():
    assert_close(case(ODD, 3, mx.float32, scale=1e-3))


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [ODD, WHOLE], ids=["odd", "4B"])
def test_kernel_gives_what_the_operations_give_with_the_longer_tables_of_yarn(sizes, dtype):
    given = case(sizes, 5, dtype, B=2).longer()
    assert_close(given)
    assert differences(run(given), case(sizes, 5, dtype, B=2).plain(), sizes.dims)


# --- the same bits ---------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_lanes_in_backward_order_give_the_same_bits(dtype):
    given = case(ODD, 5, dtype, B=2)
    assert same(run(given, order="backward"), run(given))


@emulated
def test_a_token_has_the_same_bits_alone_and_among_others():
    given = case(ODD, 5, mx.float16, B=3)
    q, k = run(given)
    for b, t in ((0, 0), (1, 3), (2, 4)):
        b, t = slice(b, b + 1), slice(t, t + 1)
        assert same(run(given.part(b, t)), (q[b, :, t], k[b, :, t]))


@emulated
def test_one_table_serves_all_batch_rows():
    given = case(ODD, 4, mx.float16, B=3)
    one = given.first_table()
    spread = tuple(mx.broadcast_to(table, (3, *table.shape[1:])) for table in one.rotary)
    assert same(run(one), run(replace(given, rotary=spread)))


@emulated
def test_gates_and_values_are_not_read():
    given = case(ODD, 2, mx.float16)
    D = ODD.D
    inner = mx.arange(given.projected.shape[-1])
    used = ((inner < 2 * H * D) & (inner % (2 * D) < D)) | ((inner >= 2 * H * D) & (inner < (2 * H + HK) * D))
    spoiled = mx.where(used, given.projected, mx.nan).astype(mx.float16)
    assert same(run(replace(given, projected=spoiled)), run(given))


# --- police and traffic ----------------------------------------------------------------------------------------------


@emulated
def test_police_finds_nothing_and_each_number_is_read_once():
    D, dims = ODD.D, ODD.dims
    _, report = emulate(case(ODD, 3, mx.bfloat16, B=2).launch, police=True)
    assert not report.faults
    (launch,) = report.launches
    rows = (H + HK) * 2 * 3
    assert (launch.barriers, launch.threadgroup_memory) == (0, 0)
    assert launch.collectives == 5 * rows
    assert launch.buffers["projected"].read == launch.buffers["projected"].unique_read == 2 * D * rows
    assert launch.buffers["cosines"].read == launch.buffers["sines"].read == 4 * dims // 2 * rows
    assert launch.device().written == 2 * D * rows


@emulated
@pytest.mark.parametrize("T", [1, 32])
def test_a_token_of_the_4b_takes_10_kilobytes_of_projections_5_collectives_a_head_and_no_barrier(T):
    _, report = emulate(case(WHOLE, T, mx.bfloat16).launch, police=True)
    assert not report.faults
    (launch,) = report.launches
    assert (launch.barriers, launch.collectives, launch.threadgroup_memory) == (0, 5 * 20 * T, 0)
    assert launch.buffers["projected"].read == launch.buffers["projected"].unique_read == 10_240 * T
    device = launch.device()
    assert (device.read, device.unique_read) == (35_840 * T, 10_496 * T + 2_048)  # the gammas for each head
    assert (device.written, device.unique_written) == (10_240 * T, 10_240 * T)


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_mac():
    """Kernels can run, and are emulated; the report of their launches."""
    self_check.cache_clear()
    with assume(EMULATED), emulation("forward", False) as report:
        yield report
    self_check.cache_clear()


def chosen(given: Case, products=None) -> tuple[mx.array, mx.array]:
    D = given.sizes.D

    def split(products):
        return mx.split(mx.concatenate(products, axis=-1), [2 * H * D, (2 * H + HK) * D], axis=-1)

    return queries_and_keys([given.projected] if products is None else products, split, *given.call()[1:])


@emulated
@pytest.mark.parametrize("sizes", [ODD, WHOLE], ids=["odd", "4B"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_passes_its_check_at_load(as_on_a_mac, dtype, sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_check(sizes, dtype)


@emulated
def test_the_kernel_runs_where_it_is_available_and_agrees(as_on_a_mac):
    given = case(ODD, 2, mx.float16)
    assert self_check(given.sizes, mx.float16)
    launches = len(as_on_a_mac.launches)
    assert not differences(chosen(given), given.plain(), ODD.dims)
    assert len(as_on_a_mac.launches) == launches + 1


@pytest.mark.core(3)
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
        ("fma(b, c, a * s)", "fma(b, c, a * s) / fma(c, c, s * s)", "q"),  # wrong with YaRN alone
    ],
)
def test_a_kernel_that_disagrees_is_switched_off_with_a_warning(as_on_a_mac, monkeypatch, right, wrong, name):
    text = fused.source("norm_rotary")
    assert right in text
    monkeypatch.setattr(fused, "source", lambda _: text.replace(right, wrong))
    given = case(ODD, 2, mx.float32)
    with pytest.warns(RuntimeWarning, match=f"norm_rotary is switched off: its {name} differs"):
        assert not self_check(given.sizes, mx.float32)
    launches = len(as_on_a_mac.launches)
    assert same(chosen(given), given.plain())
    assert len(as_on_a_mac.launches) == launches


def test_a_kernel_that_does_not_compile_is_switched_off_with_a_warning(monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: ...")

    monkeypatch.setattr(fused, "launch", refused)
    self_check.cache_clear()
    with pytest.warns(RuntimeWarning, match="is switched off: .* Unable to build metal library from source. MLX"):
        assert not self_check(ODD, mx.float32)
    self_check.cache_clear()


@pytest.mark.parametrize("sizes", [(48, 16), (96, 98), (20, 20)])
def test_sizes_that_do_not_fit_have_no_plan(sizes):
    assert not Geometry(H, HK, *sizes).supported


def refused(*_, **__):
    pytest.fail("the kernel was launched")


@pytest.mark.parametrize("sizes", [Geometry(H, HK, 48, 16), ODD], ids=["no plan", "off a Mac"])
def test_without_a_plan_or_a_mac_the_operations_run(monkeypatch, sizes):
    monkeypatch.setattr(fused, "launch", refused)
    given = case(sizes, 2, mx.bfloat16, B=2)
    with assume(OPERATIONS if sizes == ODD else EMULATED):
        assert same(chosen(given), given.plain())


def test_projections_that_come_apart_are_read_by_operations(monkeypatch):
    monkeypatch.setattr(fused, "launch", refused)
    given = case(ODD, 2, mx.bfloat16, B=2)
    products = mx.split(given.projected, [2 * H * ODD.D], axis=-1)
    with assume(EMULATED):
        assert same(chosen(given, products), given.plain())
