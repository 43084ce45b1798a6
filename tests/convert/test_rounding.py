"""Groups packed with a search: mx.quantize's format, and less error than mx.quantize."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.convert import rounding
from mlx_qwen35.quantization import MODES, Quantization

DTYPES = (mx.bfloat16, mx.float16, mx.float32)
BITS = MODES["affine"]["bits"]
HOW = [Quantization(size, bits, "affine") for bits in BITS for size in (32, 64, 128)]
SOME = [Quantization(64, bits, "affine") for bits in (2, 4, 8)]
FP = [Quantization(32, 4, "mxfp4"), Quantization(32, 8, "mxfp8"), Quantization(16, 4, "nvfp4")]
FOUR = Quantization(64, 4, "affine")


def gaussian(rows=64, columns=640, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def heavy_tailed(rows=64, columns=640):
    return np.random.default_rng(1).standard_t(5, (rows, columns)).astype(np.float32)


def peaked(columns=640):
    """Weights of columns that differ by orders of magnitude."""
    return np.exp(np.random.default_rng(2).standard_normal(columns)).astype(np.float32)


def ours(matrix, how, weights=None):
    weights = None if weights is None else mx.array(weights)
    return rounding.quantize(matrix, how, None if weights is None else np.asarray(weights))


def plain(matrix, how):
    return mx.quantize(matrix, group_size=how.group_size, bits=how.bits, mode=how.mode)


def raw(part):
    return np.asarray(mx.view(part, mx.uint16) if part.dtype in (mx.bfloat16, mx.float16) else part)


def same(parts, others):
    return all(np.array_equal(raw(a), raw(b)) for a, b in zip(parts, others, strict=True))


def wide(array):
    return np.asarray(array.astype(mx.float32)).astype(np.float64)


def unpacked(parts, how):
    """(rows, groups, group_size) float64: what is stored stands for, exactly."""
    options = {"group_size": how.group_size, "bits": how.bits}
    shape = *parts[1].shape, how.group_size
    if how.mode != "affine":
        return wide(mx.dequantize(*parts, mode=how.mode, **options)).reshape(shape)
    scales, biases = (wide(part)[..., None] for part in parts[1:])
    codes = mx.dequantize(parts[0], mx.ones(shape[:2]), mx.zeros(shape[:2]), **options)
    return wide(codes).reshape(shape) * scales + biases


def errors(parts, matrix, how, weights=None):
    """(rows, groups): the squared error of each group, weighted."""
    values = wide(matrix).reshape(*parts[1].shape, -1)
    weights = np.ones(matrix.shape[1]) if weights is None else weights
    return (weights.reshape(values.shape[1:]) * (unpacked(parts, how) - values) ** 2).sum(axis=-1)


def gain(matrix, how):
    """By what part the error of the whole matrix is less than mx.quantize's."""
    return 1 - errors(ours(matrix, how), matrix, how).sum() / errors(plain(matrix, how), matrix, how).sum()


def assert_never_worse(matrix, how, weights=None):
    mine, theirs = (errors(parts, matrix, how, weights) for parts in (ours(matrix, how, weights), plain(matrix, how)))
    assert (mine <= theirs * (1 + 1e-5)).all()


# --- format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW + FP, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_have_the_shapes_and_dtypes_of_mx_quantize(how, dtype):
    matrix = mx.array(gaussian(3, 256)).astype(dtype)
    expected = [(part.shape, part.dtype) for part in plain(matrix, how)]
    assert [(part.shape, part.dtype) for part in ours(matrix, how)] == expected


@pytest.mark.parametrize("how", [FOUR, FP[2]], ids=str)
def test_product_with_the_parts_is_that_of_the_values_they_stand_for(how):
    matrix, x = mx.array(gaussian(8, 256)), mx.array(gaussian(2, 256, seed=3))
    parts = ours(matrix, how)
    product = mx.quantized_matmul(x, *parts, group_size=how.group_size, bits=how.bits, mode=how.mode)
    expected = wide(x) @ unpacked(parts, how).reshape(8, 256).T
    np.testing.assert_allclose(product, expected, atol=1e-4)


# --- error -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW + FP, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_group_has_more_error_than_with_mx_quantize(how, dtype):
    assert_never_worse(mx.array(heavy_tailed(16)).astype(dtype), how)


@pytest.mark.parametrize("how", [FOUR, *FP], ids=str)
def test_no_group_has_more_weighted_error_than_with_mx_quantize(how):
    assert_never_worse(mx.array(heavy_tailed()), how, peaked())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [gaussian, heavy_tailed])
def test_four_bits_have_eighteen_percent_less_error(values, dtype):
    assert gain(mx.array(values(128)).astype(dtype), FOUR) >= 0.18


@pytest.mark.parametrize("bits, least", [(2, 0.34), (3, 0.25), (4, 0.2), (5, 0.18), (6, 0.215), (8, 0.49)])
def test_error_is_less_with_every_number_of_bits(bits, least):
    assert gain(mx.array(gaussian()).astype(mx.bfloat16), Quantization(64, bits, "affine")) >= least


@pytest.mark.parametrize("how, least", [(FP[0], 0.05), (FP[2], 0.22)], ids=str)
def test_error_of_four_bit_fp_modes_is_less(how, least):
    assert gain(mx.array(gaussian()).astype(mx.bfloat16), how) >= least


WEIGHTED = [(Quantization(64, bits, "affine"), 0.92) for bits in BITS] + [(FP[0], 0.998), (FP[2], 0.85)]


@pytest.mark.parametrize("how, most", WEIGHTED, ids=str)
def test_weights_lower_the_weighted_error(how, most):
    matrix, weights = mx.array(gaussian()).astype(mx.bfloat16), peaked()
    with_weights = errors(ours(matrix, how, weights), matrix, how, weights).sum()
    assert with_weights < most * errors(ours(matrix, how), matrix, how, weights).sum()


def test_only_the_ratios_of_weights_count():
    matrix, weights = mx.array(gaussian()), peaked()
    assert same(ours(matrix, FOUR, weights), ours(matrix, FOUR, weights * 2.0**100))


def test_column_without_weight_may_be_off_and_a_group_without_weight_counts_alike():
    matrix, weights = mx.array(gaussian()), peaked()
    weights[:64], weights[64:96] = 0, 0
    mine, alike = (ours(matrix, FOUR, w) for w in (weights, np.ones(640, np.float32)))
    assert same([part[:, 0] for part in mine[1:]], [part[:, 0] for part in alike[1:]])
    assert_never_worse(matrix, FOUR, weights)


# --- the starting point is mx.quantize's own -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_scales_and_biases_are_those_of_mx_quantize(bits, dtype):
    matrix = mx.array(heavy_tailed()).astype(dtype)
    groups = np.asarray(matrix.astype(mx.float32)).reshape(-1, 64)
    own = rounding._own(groups.min(axis=1), groups.max(axis=1), np.float32(2**bits - 1))
    own = rounding._as_stored(own, dtype).reshape(2, *matrix.shape[:1], -1)
    assert same([mx.array(part).astype(dtype) for part in own], plain(matrix, Quantization(64, bits, "affine"))[1:])


@pytest.mark.parametrize("how", FP, ids=str)
@pytest.mark.parametrize("magnitude", [1, 0.01, 300])
def test_fp_modes_without_a_search_give_the_bytes_of_mx_quantize(how, magnitude, monkeypatch):
    monkeypatch.setitem(rounding.OFFSETS, how.mode, (0,))
    matrix = mx.array(heavy_tailed() * np.float32(magnitude))
    assert same(ours(matrix, how), plain(matrix, how))


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, peaked()], ids=["alike", "weighted"])
@pytest.mark.parametrize("how", [*(Quantization(64, bits, "affine") for bits in BITS), *FP], ids=str)
def test_bytes_do_not_depend_on_the_chunks_of_rows(how, weights, monkeypatch):
    monkeypatch.setattr(rounding, "BLOCK", 1 << 12)  # several blocks, which begin and end within rows
    matrix = mx.array(heavy_tailed(23)).astype(mx.bfloat16)
    chunks = [ours(matrix[start:stop], how, weights) for start, stop in ((0, 1), (1, 9), (9, 23))]
    joined = [mx.concatenate(parts) for parts in zip(*chunks, strict=True)]
    assert same(joined, ours(matrix, how, weights))


@pytest.mark.parametrize("how", [*(Quantization(64, bits, "affine") for bits in BITS), *FP], ids=str)
def test_rows_of_one_group_have_the_bytes_alone_that_they_have_together(how):
    matrix = mx.array(heavy_tailed(20, how.group_size * 2)[:, : max(32, how.group_size)])
    rows = [ours(matrix[i : i + 1], how) for i in range(20)]
    assert same([mx.concatenate(parts) for parts in zip(*rows, strict=True)], ours(matrix, how))


def test_bytes_do_not_depend_on_the_size_of_blocks(monkeypatch):
    matrix = mx.array(heavy_tailed())
    once = ours(matrix, FOUR)
    monkeypatch.setattr(rounding, "BLOCK", 1 << 12)
    assert same(once, ours(matrix, FOUR))


def test_threads_with_streams_of_their_own_give_the_same_bytes():
    matrix = mx.array(heavy_tailed(256)).astype(mx.bfloat16)
    mx.eval(matrix)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: rounding.quantize(matrix, FOUR), range(4)))
    assert all(same(parts, ours(matrix, FOUR)) for parts in results)


# --- odd groups ------------------------------------------------------------------------------------------------------


def outlier():
    values = gaussian(16) * 0.01
    values[:, ::64] = 50
    return values


ODD = {
    "constant": np.full((4, 640), 0.75, np.float32),
    "zero": np.zeros((4, 640), np.float32),
    "outlier": outlier(),
    "negative": -1 - np.abs(gaussian(16)),
    "positive": 3 + np.abs(gaussian(16)),
    "two values": np.where(gaussian(16) > 0, 1, -0.5).astype(np.float32),
}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
@pytest.mark.parametrize("how", SOME + FP, ids=str)
def test_odd_groups_are_no_worse_than_with_mx_quantize(values, how):
    assert_never_worse(mx.array(values).astype(mx.bfloat16), how)


@pytest.mark.parametrize("value", [0, 0.75, -3, 1e-20, 1e38])
@pytest.mark.parametrize("how", SOME, ids=str)
def test_constant_groups_are_exact(value, how):
    matrix = mx.full((2, 128), value).astype(mx.bfloat16)
    assert errors(ours(matrix, how), matrix, how).max() == 0


MAGNITUDES = [(mx.bfloat16, power) for power in (-40, -38, -30, -20, -12, 12, 30, 38)]
MAGNITUDES += [(mx.float32, power) for power in (-44, -30, 38)] + [(mx.float16, power) for power in (-8, -6, -4, 4)]


def of_magnitude(dtype, power):
    values = np.clip(gaussian(8).astype(np.float64), -3, 3) * 10.0**power
    return mx.array(values.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("dtype, power", MAGNITUDES, ids=str)
@pytest.mark.parametrize("how", SOME, ids=str)
def test_scales_and_biases_of_any_magnitude_are_finite_and_scales_not_zero(dtype, power, how):
    _, scales, biases = ours(of_magnitude(dtype, power), how)
    assert np.isfinite(wide(scales)).all() and np.isfinite(wide(biases)).all()
    assert (wide(scales) != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", SOME, ids=str)
def test_scales_and_biases_of_the_largest_values_are_finite(dtype, how):
    matrix = mx.array(np.clip(gaussian(), -1, 1) * np.float32(mx.finfo(dtype).max)).astype(dtype)
    assert all(np.isfinite(wide(part)).all() for part in ours(matrix, how)[1:])


@pytest.mark.parametrize("dtype, power", [each for each in MAGNITUDES if each[1] < 38], ids=str)
def test_groups_of_any_magnitude_are_no_worse_than_with_mx_quantize(dtype, power):
    assert_never_worse(of_magnitude(dtype, power), FOUR)


@pytest.mark.parametrize("power", [-20, -12, 12, 30])
def test_groups_of_any_magnitude_are_packed_as_well(power):
    values = gaussian(8)
    usual, scaled = (mx.array(values * np.float32(2.0 ** (3 * k))) for k in (0, power))
    error, other = (errors(ours(matrix, FOUR), matrix, FOUR).sum() for matrix in (usual, scaled))
    assert other == pytest.approx(error * 2.0 ** (6 * power), rel=0.01)


def test_group_too_small_for_mxfp4_stays_small():
    assert np.abs(unpacked(ours(mx.full((1, 32), 1e-42), FP[0]), FP[0])).max() < 1e-36


def test_group_too_small_for_the_scales_of_nvfp4_has_the_least_and_not_zero():
    assert (unpacked(ours(mx.full((1, 32), 0.001), FP[2]), FP[2]) == 2.0**-10).all()


@pytest.mark.parametrize("how", FP, ids=str)
def test_group_too_large_for_an_fp_mode_takes_its_largest_values(how):
    values = unpacked(ours(mx.full((1, 32), 1e38), how), how)
    assert 2000 < values.min() == values.max() < np.inf
