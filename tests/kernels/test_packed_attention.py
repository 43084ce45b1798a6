"""Attention over quantized keys and values by operations: the answer in float64, however the queries are cut."""

import mlx.core as mx
import pytest
from kernels.packed_cases import DTYPES, ODD, case, differences

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels.attention import attention
from mlx_qwen35.kernels.packed_attention import Geometry, packed_attention, product_attention, unpack

S = 70


def chosen(given, causal=True):
    return packed_attention(given.q, given.keys, given.values, given.scale, causal, given.S)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 5, 6, 16, 70])  # ODD has three rows: up to five queries are multiplied packed
def test_any_number_of_queries_gets_the_answer(T, dtype):
    given = case(ODD, T, S, dtype, B=2)
    if dtype == mx.float32 or T <= 5:
        assert not differences(chosen(given), given.plain())
    else:  # keys, values and scores are rounded, as they are where nothing is quantized
        want = mx.array(given.plain().astype("float32"))
        assert mx.abs(chosen(given) - want).max().item() < (1e-2 if dtype == mx.float16 else 0.1)


@pytest.mark.parametrize("chunk", [1, 3, 5, 7, 32])
def test_the_answer_does_not_depend_on_the_chunk(chunk):
    given = case(ODD, S, S, mx.float32)
    whole = chosen(given)
    for start in range(0, S, chunk):
        stop = min(start + chunk, S)
        part = packed_attention(given.q[:, :, start:stop], given.keys, given.values, given.scale, True, stop)
        assert mx.abs(part - whole[:, :, start:stop]).max().item() < 1e-5


@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (4, 4)])
def test_few_rows_are_multiplied_packed_and_many_dequantized(bits):
    """16 rows of a key head are the most. Multiplied packed, keys and values are not rounded to 16 bit: other bits."""
    for T, few in ((4, True), (5, False)):
        given = case(Geometry(4, 64, *bits), T, S, mx.float16)
        parts = given.keys.first(S), given.values.first(S)
        by_products = product_attention(given.q, *parts, given.scale, S)
        dequantized = attention(given.q, *map(unpack, parts), given.scale, True)
        assert mx.array_equal(chosen(given), by_products if few else dequantized)
        assert not mx.array_equal(by_products, dequantized)


@pytest.mark.skipif(not backend().tiles_attention, reason="on a GPU a kernel reads them")
@pytest.mark.parametrize("T", [1, 4])
def test_few_queries_copy_no_keys_and_values(T):
    """At a length at which the columns in use of several heads do not lie side by side."""
    given = case(Geometry(1, 256, 8, 8), T, 4000, mx.float32)
    mx.eval(given.q, *given.keys[:3], *given.values[:3])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(chosen(given))
    assert mx.get_peak_memory() - before < given.keys.words.nbytes / 2


def test_queries_that_see_all_keys_are_computed_so():
    given = case(ODD, 3, S, mx.float32)
    want = attention(given.q, unpack(given.keys.first(S)), unpack(given.values.first(S)), given.scale, False)
    assert mx.array_equal(chosen(given, causal=False), want)


def test_all_columns_are_in_use_unless_a_length_is_given():
    given = case(ODD, 2, S, mx.float32, spare=0)
    assert mx.array_equal(packed_attention(given.q, given.keys, given.values, given.scale, True), chosen(given))
