"""The sum and its norm in one launch, run by the emulator, equal the two operations."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.emulator import emulate, emulated, missing

from mlx_qwen35.kernels import metal
from mlx_qwen35.kernels.add_norm import fused_add_norm, plain_add_norm, verdict

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
# Half a step of the dtype where the rounding of float32 decides, and float32's own.
MOST = {mx.float32: 2e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


def inputs(dtype: mx.Dtype, shape: tuple[int, ...], scale: float = 1.0) -> tuple[mx.array, mx.array, mx.array, float]:
    rng = np.random.default_rng(shape[-1])
    x, y = (mx.array((scale * rng.normal(size=shape)).astype(np.float32)).astype(dtype) for _ in range(2))
    return x, y, mx.array(rng.normal(1, 0.3, shape[-1:]).astype(np.float32)), 1e-6


@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 3, 64), (2, 5, 136), (3, 1, 257), (1, 2, 2560)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_sum_and_norm_equal_those_of_operations(dtype, shape, scale):
    given = inputs(dtype, shape, scale)
    (total, normed), _ = emulate(fused_add_norm, *given)
    want_total, want = plain_add_norm(*given)
    assert mx.array_equal(total, want_total)
    difference = mx.abs(normed.astype(mx.float32) - want.astype(mx.float32))
    assert (difference <= MOST[dtype] * mx.maximum(mx.abs(want.astype(mx.float32)), 1e-3)).all().item()


def test_the_bits_do_not_depend_on_the_order_of_lanes_and_no_rule_is_broken():
    given = inputs(mx.bfloat16, (2, 3, 2560))
    forward, report = emulate(fused_add_norm, *given, police=True)
    backward, _ = emulate(fused_add_norm, *given, order="backward")
    assert all(mx.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not report.faults and not report.warnings
    (launch,) = report.launches
    assert launch.barriers == 6 and launch.threadgroup_memory == 128  # one barrier for each of 6 rows


@pytest.fixture
def fresh():
    verdict.cache_clear()
    with emulated("forward", False):
        yield
    verdict.cache_clear()


@pytest.mark.parametrize("dtype", MOST, ids=str)
def test_the_kernel_passes_its_check_at_load(fresh, dtype):
    assert verdict(96, dtype)


@pytest.mark.parametrize(("right", "wrong"), [("+ epsilon", "+ 1e-2f"), ("float(sum)", "float(stream[first + at])")])
def test_a_broken_kernel_is_switched_off_with_a_warning(fresh, monkeypatch, right, wrong):
    text = metal.source("add_norm")
    assert right in text
    monkeypatch.setattr(metal, "source", lambda name: text.replace(right, wrong))
    metal._kernel.cache_clear()
    with pytest.warns(RuntimeWarning, match="the Metal kernel add_norm is switched off: its norm differs"):
        assert not verdict(96, mx.float32)
    metal._kernel.cache_clear()
