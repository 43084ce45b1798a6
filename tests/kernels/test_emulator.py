"""The emulator runs Metal as Metal would: small kernels, one for each thing that the kernels here use."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.emulator import CompileError, emulate, missing
from kernels.small import run

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

FLOATS = [mx.float32, mx.float16, mx.bfloat16]


def numbers(source: str, count: int = 32, dtype: mx.Dtype = mx.float32, **options: object) -> list[float]:
    """What a kernel without inputs writes into `out` by a simdgroup (or `grid`, `threadgroup`)."""
    return run(source, {"unused": mx.zeros((8,))}, ((count,), dtype), **options)[0].tolist()


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("thread_position_in_grid.x", lambda x, y: x),
        ("thread_position_in_grid.y", lambda x, y: y),
        ("thread_position_in_threadgroup.x", lambda x, y: x % 8),
        ("threadgroup_position_in_grid.x", lambda x, y: x // 8),
        ("threadgroups_per_grid.x", lambda x, y: 3),
        ("threads_per_grid.x", lambda x, y: 20),
        ("threads_per_threadgroup.x", lambda x, y: 4 if x >= 16 else 8),
        ("dispatch_threads_per_threadgroup.x", lambda x, y: 8),
        ("thread_index_in_threadgroup", lambda x, y: y % 5 * (4 if x >= 16 else 8) + x % 8),
        ("thread_index_in_simdgroup", lambda x, y: (y % 5 * (4 if x >= 16 else 8) + x % 8) % 32),
        ("simdgroup_index_in_threadgroup", lambda x, y: (y % 5 * (4 if x >= 16 else 8) + x % 8) // 32),
        ("simdgroups_per_threadgroup", lambda x, y: 1 if x >= 16 else 2),
        ("threads_per_simdgroup", lambda x, y: 32),
    ],
)
def test_thread_attribute_in_a_grid_with_clipped_edge(attribute: str, expected) -> None:
    source = f"out[thread_position_in_grid.y * 20 + i] = {attribute};"
    found = numbers(source, 200, mx.int32, grid=(20, 10, 1), threadgroup=(8, 5, 1))
    assert found == [expected(x, y) for y in range(10) for x in range(20)]


def test_both_orders_run_every_thread() -> None:
    for order in ("forward", "backward"):
        assert numbers("out[i] = i;", 300, grid=300, threadgroup=64, order=order) == list(range(300))


def test_an_order_dependent_kernel_differs_between_the_orders() -> None:
    source = "threadgroup float last[1]; last[0] = i; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = last[0];"
    assert (numbers(source)[0], numbers(source, order="backward")[0]) == (31, 0)


def test_threadgroup_memory_is_shared_behind_a_barrier() -> None:
    source = """
        threadgroup float a[64], b[2][32];
        a[i] = i;
        b[1 - i / 32][i % 32] = 100 + i;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = a[63 - i] + b[i / 32][i % 32];
    """
    found = numbers(source, 64, grid=64, threadgroup=64)
    assert found == [63 - i + 100 + (i + 32) % 64 for i in range(64)]


def test_threadgroup_memory_starts_as_nan() -> None:
    assert np.isnan(numbers("threadgroup float a[32]; out[i] = a[i];")).all()


# --- simdgroups ------------------------------------------------------------------------------------------------------


@pytest.mark.core(5)
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("simd_sum(x)", lambda x: [x.sum()] * 32),
        ("simd_max(x)", lambda x: [x.max()] * 32),
        ("simd_min(x)", lambda x: [x.min()] * 32),
        ("simd_shuffle(x, 31 - lane)", lambda x: x[::-1]),
        ("simd_shuffle_xor(x, 5)", lambda x: x[np.arange(32) ^ 5]),
        ("simd_shuffle_down(x, 3) * (lane < 29)", lambda x: [*x[3:]]),
        ("simd_shuffle_up(x, 2)", lambda x: [None, None, *x[:-2]]),
        ("simd_broadcast(x, 7)", lambda x: [x[7]] * 32),
        ("simd_broadcast_first(x)", lambda x: [x[0]] * 32),
        ("simd_prefix_inclusive_sum(x)", np.cumsum),
        ("simd_prefix_exclusive_sum(x)", lambda x: np.cumsum(x) - x),
        ("simd_or(uint(x))", lambda x: [np.bitwise_or.reduce(x.astype(int))] * 32),
        ("simd_any(x == 3)", lambda x: [1] * 32),
        ("simd_all(x == 3)", lambda x: [0] * 32),
    ],
)
def test_collective(call: str, expected) -> None:
    x = np.arange(32) * 7 % 32
    found = numbers(f"float x = i * 7 % 32; out[i] = {call};")
    wanted = list(expected(x))
    assert [a for a, b in zip(found, wanted, strict=False) if b is not None] == [b for b in wanted if b is not None]


def test_simd_sum_is_a_butterfly() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(32).astype(np.float32)
    found = run("out[i] = simd_sum(x[i]);", {"x": mx.array(x)}, ((32,), mx.float32))[0].tolist()
    for step in (1, 2, 4, 8, 16):
        x = x + x[np.arange(32) ^ step]
    assert found == x.tolist()


def test_simd_sum_of_the_lanes_that_are_there() -> None:
    assert numbers("out[i] = simd_sum(1.0f);", 40, grid=40, threadgroup=64) == [32] * 32 + [8] * 8


def test_a_collective_may_stand_in_a_branch_that_a_whole_simdgroup_takes() -> None:
    source = "float x = 1; if (group == 1) x = simd_sum(x); out[i] = x;"
    assert numbers(source, 64, grid=64, threadgroup=64) == [1] * 32 + [32] * 32


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_bfloat_rounds_to_nearest_even() -> None:
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    x[:6] = [np.inf, -np.inf, 3.4e38, 1.00390625, 1.01171875, 0.0]  # the fourth and fifth lie half way
    array = mx.array(x)
    found = run("out[i] = bfloat16_t(x[i]);", {"x": array}, ((4096,), mx.bfloat16), grid=4096, threadgroup=1024)[0]
    assert mx.array_equal(found, array.astype(mx.bfloat16))


def test_bfloat_of_nan_is_nan() -> None:
    found = run("out[i] = bfloat16_t(x[i]);", {"x": mx.full((32,), np.nan)}, ((32,), mx.bfloat16))[0]
    assert mx.isnan(found).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operator", ["+", "-", "*", "/"])
def test_arithmetic_rounds_to_the_type(dtype: mx.Dtype, operator: str) -> None:
    x, y = (mx.random.normal((256,), key=mx.random.key(k)).astype(dtype) for k in (0, 1))
    source = f"out[i] = x[i] {operator} y[i];"
    found = run(source, {"x": x, "y": y}, ((256,), dtype), grid=256, threadgroup=256)[0]
    exact = eval(f"x {operator} y", {"x": x.astype(mx.float32), "y": y.astype(mx.float32)})
    assert mx.array_equal(found, exact.astype(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_vectors_of_each_type_are_read_converted_and_written(dtype: mx.Dtype) -> None:
    x = mx.arange(128).astype(dtype)
    source = """
        float4 v = static_cast<float4>(((const device vec<T, 4>*)x)[i]);
        ((device vec<T, 4>*)out)[i] = vec<T, 4>(v * 2.0f + float4(1.0f, 2.0f, 3.0f, v.x).wzyx);
    """
    found = run(source, {"x": x}, ((128,), dtype), template={"T": dtype})[0].astype(mx.float32)
    v = np.arange(128).reshape(32, 4)
    added = np.stack([v[:, 0], np.full(32, 3), np.full(32, 2), np.full(32, 1)], axis=1)
    assert found.tolist() == (v * 2 + added).reshape(-1).tolist()


def test_packed_vectors_need_no_alignment() -> None:
    source = "float4 v = *(const device packed_float4*)(x + i + 1); out[i] = v.w;"
    assert run(source, {"x": mx.arange(64.0)}, ((32,), mx.float32))[0].tolist() == list(range(4, 36))


@pytest.mark.core(6)
@pytest.mark.parametrize(
    ("call", "function"),
    [
        ("exp(x)", np.exp),
        ("precise::exp(x)", np.exp),
        ("metal::precise::exp(x)", np.exp),
        ("metal::fast::exp(x)", np.exp),
        ("log(x)", np.log),
        ("rsqrt(x)", lambda x: 1 / np.sqrt(x)),
        ("sqrt(x)", np.sqrt),
        ("tanh(x)", np.tanh),
        ("clamp(x, 0.5f, 1.5f)", lambda x: np.clip(x, 0.5, 1.5)),
        ("max(x, 1.0f) - min(x, 2.0f)", lambda x: np.maximum(x, 1) - np.minimum(x, 2)),
        ("exp(float4(x)).z", np.exp),
        ("dot(float4(x), float4(1.0f))", lambda x: 4 * x),
        ("as_type<float>(as_type<uint>(x) + 1u)", lambda x: np.nextafter(x, np.float32(9))),
    ],
)
def test_function(call: str, function) -> None:
    x = np.linspace(0.1, 3, 32).astype(np.float32)
    found = run(f"float x = a[i]; out[i] = {call};", {"a": mx.array(x)}, ((32,), mx.float32))[0]
    np.testing.assert_allclose(np.array(found), function(x), rtol=3e-7)


def test_fma_rounds_once_and_a_sum_of_a_product_twice() -> None:
    x = np.float32(1 + 2**-12)
    source = "out[i] = i ? a[i] * a[i] - 1.0f : fma(a[i], a[i], -1.0f);"
    found = run(source, {"a": mx.full((32,), x)}, ((32,), mx.float32))[0].tolist()[:2]
    assert found == [np.float32(float(x) ** 2 - 1), np.float32(x * x) - 1]
    assert found[0] != found[1]


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_small_arrays_numbers_and_facts_about_arrays_reach_the_kernel() -> None:
    source = "out[i] = a[i] + few[2] + whole + real + a_shape[1] * 10 + a_ndim * 100 + a_strides[0] * 1000;"
    inputs = {"a": mx.zeros((4, 8)), "few": mx.array([1.0, 2.0, 3.0]), "whole": 4, "real": 0.5}
    assert run(source, inputs, ((32,), mx.float32))[0].tolist() == [8 * 1000 + 2 * 100 + 8 * 10 + 7.5] * 32


def test_an_input_that_is_not_row_contiguous_is_copied() -> None:
    x = mx.arange(32).reshape(4, 8).T
    assert run("out[i] = x[i];", {"x": x}, ((32,), mx.int32))[0].tolist() == x.flatten().tolist()


def test_template_values_and_functions_of_the_header() -> None:
    header = "template <typename U> U twice(U x) { return x + x; }\nconstant float table[2] = {3.0f, 4.0f};\n"
    source = "out[i] = FLAG ? T(twice(N)) + T(table[1]) : T(0);"
    found = numbers(source, 32, mx.float16, header=header, template={"T": mx.float16, "N": 21, "FLAG": True})
    assert found == [46] * 32


def test_init_value_fills_the_outputs() -> None:
    assert numbers("if (i < 2) out[i] = 5;", init_value=2) == [5, 5] + [2] * 30


def test_other_operations_and_several_launches_work_together() -> None:
    def function(x: mx.array) -> mx.array:
        kernel = mx.fast.metal_kernel(
            name="add_one", input_names=["x"], output_names=["y"],
            source="y[thread_position_in_grid.x] = x[thread_position_in_grid.x] + 1;",
        )  # fmt: skip
        for _ in range(2):
            options = {"grid": (8, 1, 1), "threadgroup": (8, 1, 1), "output_shapes": [(8,)]}
            (x,) = kernel(inputs=[x * 10], output_dtypes=[x.dtype], **options)
        return x

    found, report = emulate(mx.compile(function), mx.arange(8.0))
    assert found.tolist() == [(x * 10 + 1) * 10 + 1 for x in range(8)]
    assert len(report.launches) == 2


# --- what clang must refuse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("const thread float* p = x; out[i] = p[i];", "cannot initialize .* 'device float const"),
        ("threadgroup float s[4]; device float* p = s; out[i] = p[0];", "cannot initialize .* 'device float"),
        ("const device float* p = x; const constant float* q = p; out[i] = q[0];", "cannot initialize .* 'device"),
        ("x[i] = 0; out[i] = 0;", "read-only variable"),
        ("bfloat16_t b = float(i); out[i] = b;", "no viable conversion"),
        ("out[i] = max(1.0f, i);", "ambiguous"),
        ("float y; out[i] = y;", "uninitialized"),
        ("out[i] = log1p(x[i]);", "undeclared identifier"),
    ],
)
def test_text_that_metal_would_refuse_is_refused(source: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        run(source, {"x": mx.zeros((32,))}, ((32,), mx.float32))
