"""The checks at load on a machine that multiplies float32 matrices with 10 bits of mantissa, as M5 does by itself."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from kernels import delta_cases, norm_cases, rotary_cases
from kernels.backends import EMULATED
from kernels.emulator import emulated, missing
from kernels.shortened import rounded, shortened_products

from mlx_qwen35.backend import assume
from mlx_qwen35.kernels import add_norm, attention, fused, fused_delta, norm_rotary
from mlx_qwen35.kernels.gated_delta import chunked_rule, gated_delta, sequential_rule
from mlx_qwen35.kernels.products import shortened

emulation = pytest.mark.skipif(bool(missing()), reason=missing())
CHECKS = {
    "gated_delta": lambda dtype: fused_delta.self_check(delta_cases.ODD, dtype),
    "norm_rotary": lambda dtype: norm_rotary.self_check(rotary_cases.ODD, dtype),
    "add_norm": lambda dtype: add_norm.self_check(136, dtype),
    "attention": lambda dtype: attention.fused_self_check(256, dtype),
}


@contextlib.contextmanager
def mac(right: str = "", wrong: str = "", forced: Callable[..., Any] = rounded) -> Iterator[None]:
    """A Mac that shortens products, its kernels emulated, `right` in their texts `wrong`. forced: see shortened.py."""
    source = fused.source
    with (
        assume(EMULATED),
        mock.patch.object(fused, "source", lambda name: source(name).replace(right, wrong) if right else source(name)),
        emulated(),
        shortened_products(forced),
    ):
        forget_checks()
        try:
            yield
        finally:
            forget_checks()


def forget_checks() -> None:
    for self_check in (fused_delta.self_check, norm_rotary.self_check, add_norm.self_check, attention.fused_self_check):
        self_check.cache_clear()


# --- the simulation --------------------------------------------------------------------------------------------------


def test_operands_keep_10_bits_of_mantissa():
    x = mx.array([1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-12, 3.0e38, 0.0])
    assert rounded(x).tolist()[:4] == [1 + 2.0**-10, 1, 1 + 2.0**-9, -1]
    assert mx.array_equal(rounded(x.astype(mx.bfloat16)), x.astype(mx.bfloat16))


def test_shortened_products_are_seen_where_they_are():
    assert not shortened()
    with shortened_products():
        assert shortened()
    assert not shortened()


def test_the_chunked_rule_has_other_digits_there_and_the_definition_the_same():
    case = delta_cases.case(delta_cases.ODD, 35, mx.float32)

    def states() -> list[mx.array]:
        memories = [gated_delta(*case.parts(), case.weights, case.memory, rule=rule)[1] for rule in RULES]
        mx.eval(memories)
        return [memory.recurrent_state for memory in memories]

    RULES = (sequential_rule, chunked_rule)
    want = states()
    with shortened_products():
        got = states()
    assert delta_cases.same(got[:1], want[:1])
    assert mx.abs(got[1] - want[1]).max().item() > 1e-4  # what the check at load allows the kernel


# --- the checks at load ----------------------------------------------------------------------------------------------


@emulation
@pytest.mark.parametrize("dtype", norm_cases.DTYPES, ids=str)
@pytest.mark.parametrize("kernel", CHECKS)
def test_no_kernel_is_switched_off_where_products_are_shortened(kernel, dtype):
    with mac(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CHECKS[kernel](dtype)


@emulation
@pytest.mark.parametrize(
    ("kernel", "right", "wrong"),
    [
        ("gated_delta", "rsqrt(kk + 1e-6f)", "rsqrt(1.001f * kk + 1e-6f)"),
        ("gated_delta", "S[n][i] * decay)", "S[n][i] * decay * 0.9999f)"),
        ("norm_rotary", "fma(b, c, a * s)", "fma(b, c, -(a * s))"),
        ("add_norm", "sum / WIDTH + epsilon", "sum / THREADS + epsilon"),
    ],
)
def test_a_wrong_kernel_is_switched_off_where_products_are_shortened(kernel, right, wrong):
    assert right in fused.source(kernel)
    with mac(right, wrong), pytest.warns(RuntimeWarning, match=f"{kernel} is switched off: its"):
        assert not CHECKS[kernel](mx.float32)


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_attention_that_disagrees_is_told_of_where_products_are_shortened(wrong):
    with mac(forced=lambda out: wrong * out), pytest.warns(RuntimeWarning, match="force_fused"):
        assert not CHECKS["attention"](mx.float32)


def test_attention_is_held_to_float32_where_products_are_whole(monkeypatch):
    own = mx.fast.scaled_dot_product_attention
    short = lambda *qkv, force_fused, **options: own(*map(rounded, qkv), **options)  # noqa: E731
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", short)
    with assume(EMULATED), pytest.warns(RuntimeWarning, match="differs from the definition"):
        assert not attention.fused_self_check.__wrapped__(256, mx.float32)
