"""Proof with kernels that run on Macs: mlx-lm's gated delta kernels, as installed, against its own operations."""

from collections.abc import Callable, Iterator
from unittest import mock

import mlx.core as mx
import pytest
from kernels.emulator import Report, emulate, missing
from mlx_lm.models import gated_delta as theirs

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(autouse=True)
def without_compiled_operations() -> Iterator[None]:
    mx.disable_compile()  # it would start a C++ compiler of the system
    yield
    mx.enable_compile()


KERNELS = ("generic", "xtree", "packed")
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def arrays(T: int, dtype: mx.Dtype, B: int = 1, Hk: int = 2, Hv: int = 4, Dv: int = 16) -> list[mx.array]:
    """q, k, v, g, beta, state as the model hands them over."""
    mx.random.seed(T)
    Dk = 128  # all that the packed kernel takes
    q, k = (mx.random.normal((B, T, Hk, Dk)) for _ in range(2))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = mx.random.normal((B, T, Hv, Dv))
    g, beta = mx.random.uniform(0.9, 1, (B, T, Hv)), mx.random.uniform(0, 1, (B, T, Hv))
    state = mx.random.normal((B, Hv, Dv, Dk))
    return [q.astype(dtype), k.astype(dtype), v.astype(dtype), g, beta.astype(dtype), state]


def their_kernel(kernel: str, values: list[mx.array], mask: mx.array | None = None, **options: object):
    """((y, state), report) of one of their kernels."""

    def function() -> tuple[mx.array, mx.array]:
        with (
            mock.patch.object(mx.metal, "is_available", lambda: True),
            mock.patch.multiple(
                theirs,
                _gated_delta_kernel=theirs._make_gated_delta_kernel(),
                _gated_delta_kernel_masked=theirs._make_gated_delta_kernel(has_mask=True),
                _gated_delta_kernel_xtree=theirs._make_gated_delta_kernel_xtree(),
                _gated_delta_kernel_packed=theirs._make_gated_delta_packed_kernel(),
            ),
        ):
            call: Callable[..., tuple[mx.array, mx.array]] = {
                "generic": theirs.gated_delta_kernel_unpacked,
                "xtree": theirs.gated_delta_kernel_xtree,
                "packed": theirs.gated_delta_kernel,
            }[kernel]
            return call(*values, mask)

    return emulate(function, **options)


def distance(a: mx.array, b: mx.array) -> float:
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


@pytest.mark.core(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_agrees_with_the_operations(kernel: str, dtype: mx.Dtype) -> None:
    values = arrays(7, dtype, B=2)
    (y, state), _ = their_kernel(kernel, values)
    expected_y, expected_state = theirs.gated_delta_ops(*(x.astype(mx.float32) for x in values))
    assert distance(y, expected_y) < {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]
    assert distance(state, expected_state) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_three_kernels_give_the_same_bits(dtype: mx.Dtype) -> None:
    values = arrays(5, dtype)
    results = [their_kernel(kernel, values)[0] for kernel in KERNELS]
    for y, state in results[1:]:
        assert mx.array_equal(y, results[0][0])
        assert mx.array_equal(state, results[0][1])


@pytest.mark.full
def test_the_masked_kernel_agrees_with_the_operations() -> None:
    values, mask = arrays(6, mx.float32, B=2), mx.array([[1, 1, 1, 1, 0, 0], [1] * 6]).astype(mx.bool_)
    (y, state), _ = their_kernel("generic", values, mask)
    expected_y, expected_state = theirs.gated_delta_ops(*values, mask=mask)
    assert distance(y[0, :4], expected_y[0, :4]) < 2e-6
    assert distance(state, expected_state) < 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_both_orders_give_the_same_bits(kernel: str) -> None:
    values = arrays(3, mx.bfloat16)
    forward, backward = (their_kernel(kernel, values, order=order)[0] for order in ("forward", "backward"))
    assert all(mx.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_police_finds_nothing(kernel: str) -> None:
    assert police(kernel, 2).faults == []


def police(kernel: str, T: int) -> Report:
    """With the head sizes of Qwen3.5-4B and two of its value heads."""
    return their_kernel(kernel, arrays(T, mx.bfloat16, Hk=1, Hv=2, Dv=128), police=True)[1]


@pytest.mark.parametrize(("kernel", "collectives"), [("generic", 2 * 128), ("packed", 2 * 2 * 16)])
def test_collectives_for_each_token_and_head(kernel: str, collectives: int) -> None:
    (one,), (three,) = police(kernel, 1).launches, police(kernel, 3).launches
    assert (three.collectives - one.collectives) // 2 == 2 * collectives


@pytest.mark.parametrize(("kernel", "lanes", "elements"), [("generic", 128 * 32, 4), ("packed", 16 * 32, 32)])
def test_bytes_requested_for_each_token_and_lane(kernel: str, lanes: int, elements: int) -> None:
    (one,), (three,) = (police(kernel, T).launches for T in (1, 3))
    before, after = (launch.buffers | launch.constants for launch in (one, three))
    tokens, heads = 2, 2
    names = ("q", "k", "v", "g", "beta", "T")
    grown = {name: (after[name].read - before[name].read) // (tokens * heads * lanes) for name in names}
    # k on both sides of a collective; the gate and T, the end of the loop, are four bytes
    assert grown == {"q": 2 * elements, "k": 4 * elements, "v": 2, "g": 4, "beta": 2, "T": 4}
