"""The sum and its norm in one launch, run by the emulator, equal the two operations."""

import mlx.core as mx
import pytest
from kernels.emulator import emulate, emulated, missing
from kernels.norm_cases import DTYPES, WHOLE, case, differences, unequal

from mlx_qwen35.kernels import fused
from mlx_qwen35.kernels.add_norm import fused_add_norm, plain_add_norm, self_check

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.mark.core(12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 3, 64), (2, 5, 136), (3, 1, 257), (1, 2, WHOLE)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_sum_and_norm_equal_those_of_operations(dtype, shape, scale):
    given = case(shape, dtype, scale)
    found = differences(emulate(fused_add_norm, *given)[0], plain_add_norm(*given))
    assert not found, found


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_kernel_rounds_where_the_operations_round(dtype):
    """With one rounding more, fewer or elsewhere, a fifth of the numbers differ, many by no more than a step.

    As it is, 0.1 % do: those so near the middle of a step that the last bit of a float32 decides.
    """
    given = case((2, 5, WHOLE), dtype)
    assert unequal(emulate(fused_add_norm, *given)[0], plain_add_norm(*given)) < 1e-2


def test_the_bits_do_not_depend_on_the_order_of_lanes():
    given = case((2, 3, WHOLE), mx.bfloat16)
    forward, _ = emulate(fused_add_norm, *given)
    backward, _ = emulate(fused_add_norm, *given, order="backward")
    assert all(mx.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("T", [1, 32])
def test_a_token_takes_20_kilobytes_read_one_barrier_and_40_collectives_and_no_rule_is_broken(T):
    _, report = emulate(fused_add_norm, *case((1, T, WHOLE), mx.bfloat16), police=True)
    assert not report.faults
    (launch,) = report.launches
    assert (launch.barriers, launch.collectives, launch.threadgroup_memory) == (T, 40 * T, 128)
    device = launch.device()
    assert (device.read, device.unique_read) == (20_480 * T, 10_240 * T + 10_240)  # gamma again for each token
    assert (device.written, device.unique_written) == (10_240 * T, 10_240 * T)


@pytest.fixture
def fresh():
    self_check.cache_clear()
    with emulated("forward", False):
        yield
    self_check.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_passes_its_check_at_load(fresh, dtype):
    assert self_check(96, dtype)


@pytest.mark.parametrize(("right", "wrong"), [("+ epsilon", "+ 1e-2f"), ("float(sum)", "float(stream[first + at])")])
def test_a_broken_kernel_is_switched_off_with_a_warning(fresh, monkeypatch, right, wrong):
    text = fused.source("add_norm")
    assert right in text
    monkeypatch.setattr(fused, "source", lambda name: text.replace(right, wrong))
    with pytest.warns(RuntimeWarning, match="the kernel add_norm is switched off: its norm differs"):
        assert not self_check(96, mx.float32)
