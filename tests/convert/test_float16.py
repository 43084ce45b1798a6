"""Conversion to float16: what it cannot hold is found, named, and kept in another dtype."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from converting import arrays_of, converted, files_of, nearest, unpacked

from mlx_qwen35.checkpoint.checkpoint import FP32_ORIGINAL, open_checkpoint
from mlx_qwen35.checkpoint.float16 import SMALLEST, unfit
from mlx_qwen35.checkpoint.random import _random_tensor, geometry, write_random_checkpoint
from mlx_qwen35.convert import stream
from mlx_qwen35.load import load_model

LAYER = "model.language_model.layers.1."
DOWN, NORM, BIAS = f"{LAYER}mlp.down_proj.weight", f"{LAYER}linear_attn.norm.weight", "model.visual.merger.norm.bias"
IDS = np.random.default_rng(7).integers(0, 980, (1, 6))


def source_with(folder, change, dtype=mx.bfloat16):
    """A random checkpoint whose tensors went through `change`: Hugging Face name -> function of a float32 array."""

    def tensor(name, shape):
        array = np.array(_random_tensor(name, shape).astype(mx.float32))
        return mx.array(change[name](array) if name in change else array)

    return write_random_checkpoint(folder, geometry("tiny"), dtype=dtype, tensor=tensor)


def at(where, value):
    def change(array):
        array[where] = value
        return array

    return change


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (at((3, 4), 1e30), "holds 1e\\+30"),
        pytest.param(at((3, 4), -65536.0), "holds 6.55e\\+04", marks=pytest.mark.full),
        (at(slice(2, 5), 2.0**-17), "3 of 256 rows are below 1.5e-05"),
    ],
)
def test_matrix_that_float16_cannot_hold_stays_as_it_is_and_is_named(tmp_path, monkeypatch, change, why):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 10_000)
    source = source_with(tmp_path / "raw", {DOWN: change})
    with pytest.warns(RuntimeWarning, match=rf"1 tensors stay out of float16, .*{DOWN} \({why}"):
        report = converted(source, tmp_path / "out", dtype="float16")
    assert set(report.unfit) == {DOWN}
    before, after = arrays_of(source), arrays_of(tmp_path / "out")
    assert after[DOWN].dtype == mx.bfloat16 and mx.array_equal(after[DOWN], before[DOWN])
    assert {name for name, array in after.items() if array.dtype == mx.bfloat16} == {DOWN}


def test_values_that_float16_holds_are_not_named(tmp_path):
    change = {DOWN: at((0, 0), 65280.0), BIAS: at(slice(None), SMALLEST), NORM: at(0, 0.0)}
    report = converted(source_with(tmp_path / "raw", change), tmp_path / "out", dtype="float16")
    assert report.unfit == {}
    assert {array.dtype for name, array in arrays_of(tmp_path / "out").items() if "A_log" not in name} == {
        mx.float16, mx.float32
    }  # fmt: skip


def test_zero_centred_norm_may_vanish_because_one_is_added(tmp_path):
    change = {f"{LAYER}input_layernorm.weight": at(slice(None), 1e-9)}
    assert converted(source_with(tmp_path / "raw", change), tmp_path / "out", dtype="float16").unfit == {}


def test_vector_that_stays_float32_needs_no_exact_copy(tmp_path):
    source = source_with(tmp_path / "raw", {NORM: at(5, 1e6)})
    with pytest.warns(RuntimeWarning, match=NORM):
        converted(source, tmp_path / "out", dtype="float16")
    after = arrays_of(tmp_path / "out")
    assert mx.array_equal(after[NORM], arrays_of(source)[NORM]) and after[NORM].dtype == mx.float32
    assert FP32_ORIGINAL + NORM not in after and FP32_ORIGINAL + NORM.replace("s.1.", "s.0.") in after


@pytest.mark.parametrize(
    "change",
    [at((0, 0), 1e6), at((slice(0, 9), slice(None)), [1e-5, -1e-5] * 224)],
    ids=["too large", "vanishing scales"],
)
def test_packed_matrix_gets_scales_in_bfloat16(tmp_path, change):
    source = source_with(tmp_path / "raw", {DOWN: change})
    with pytest.warns(RuntimeWarning, match=DOWN):
        nearest(source, tmp_path / "out", dtype="float16", quantize=True)
    after, stem = arrays_of(tmp_path / "out"), DOWN.removesuffix("weight")
    parts = mx.quantize(arrays_of(source)[DOWN], group_size=64, bits=4, stream=mx.cpu)
    for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
        assert mx.array_equal(after[stem + suffix], part) and after[stem + suffix].dtype == part.dtype
    scales = {array.dtype for name, array in after.items() if name.endswith(".scales") and not name.startswith(stem)}
    assert scales == {mx.float16}


@pytest.mark.core(2)
@pytest.mark.parametrize("rounding", ["search", "nearest"])
@pytest.mark.parametrize(
    "multiple", [7.5, 8.0, *(pytest.param(m, marks=pytest.mark.full) for m in (6.0, 6.5, 7.0, 8.5, 9.0, 9.5, 10.0))]
)
def test_nothing_is_written_in_float16_that_loading_in_float16_would_name(tmp_path, rounding, multiple):
    """Scales on both sides of the threshold, which is at 7.5 or 8 times the smallest number."""
    source = source_with(tmp_path / "raw", {DOWN: lambda a: np.sign(a) * multiple * SMALLEST})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        report = converted(source, tmp_path / "out", dtype="float16", quantize=True, rounding=rounding)
    arrays = {name: array for name, array in arrays_of(tmp_path / "out").items() if array.dtype == mx.float16}
    assert unfit((name, array) for name, array in arrays.items() if name.startswith(LAYER + "mlp")) == {}
    assert bool(report.unfit) or multiple > 7


def test_second_conversion_of_a_folder_with_kept_tensors_keeps_them(tmp_path):
    source = source_with(tmp_path / "raw", {DOWN: at((0, 0), 1e6)})
    with pytest.warns(RuntimeWarning):
        once = nearest(source, tmp_path / "once", dtype="float16")
    with pytest.warns(RuntimeWarning, match=DOWN):
        again = nearest(once, tmp_path / "again")
    assert files_of(again) == files_of(once)


def test_scales_that_stayed_bfloat16_are_copied_as_they_are(tmp_path):
    source = source_with(tmp_path / "raw", {DOWN: at((0, 0), 1e6)})
    with pytest.warns(RuntimeWarning):
        once = nearest(source, tmp_path / "once", dtype="float16", quantize=True)
    assert arrays_of(once)[DOWN.replace("weight", "scales")].dtype == mx.bfloat16
    assert files_of(nearest(once, tmp_path / "again")) == files_of(once)  # and nothing is named again


def test_overflow_is_no_matter_in_bfloat16(tmp_path):
    source = source_with(tmp_path / "raw", {DOWN: at((0, 0), 1e30)})
    after = arrays_of(unpacked(source, tmp_path / "out"))
    assert mx.array_equal(after[DOWN], arrays_of(source)[DOWN])


@pytest.mark.full
@pytest.mark.core(1)
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("program", ["mlx_lm", "mlx_vlm"])
def test_peers_load_a_folder_with_kept_tensors(tmp_path, program, quantize):
    utilities = pytest.importorskip(f"{program}.utils")
    small = at((slice(0, 3), slice(None)), [1e-6, -1e-6] * 224)
    change = {DOWN: small, f"{LAYER}mlp.up_proj.weight": at((0, 0), 7e4)}
    source = source_with(tmp_path / "raw", change)
    with pytest.warns(RuntimeWarning, match="2 tensors"):
        nearest(source, tmp_path / "out", dtype="float16", quantize=quantize)
    reference = load_model(open_checkpoint(tmp_path / "out"), mx.float32, "out")(mx.array(IDS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = utilities.load_model(tmp_path / "out")
    logits = model[0](mx.array(IDS)) if program == "mlx_lm" else model.language_model(mx.array(IDS)).logits
    assert mx.abs(logits.astype(mx.float32) - reference).max().item() < 0.02
