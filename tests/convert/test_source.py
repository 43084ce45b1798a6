"""Sources other than raw 16-bit and 32-bit folders: FP8 ones, folders of MLX programs, packed ones."""

import json
import shutil
import warnings

import mlx.core as mx
import numpy as np
import pytest
from converting import arrays_of, converted, files_of, fp8_folder, mlx_layout, nearest, unpacked
from geometries import changed
from refusing import refused

from mlx_qwen35 import load
from mlx_qwen35.checkpoint.checkpoint import FP32_ORIGINAL, open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert, stream
from mlx_qwen35.convert.fp8 import e4m3
from mlx_qwen35.fields import read_json
from mlx_qwen35.load import load_model, load_vision_encoder
from mlx_qwen35.quantization import Quantization

IDS = mx.array(np.random.default_rng(3).integers(0, 980, (1, 7)))
LAYER = "model.language_model.layers.0."
DOWN = f"{LAYER}mlp.down_proj.weight"


def logits(folder) -> mx.array:
    return load_model(open_checkpoint(folder), mx.float32, str(folder))(IDS)


def largest(a: mx.array, b: mx.array) -> float:
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


# --- FP8 -------------------------------------------------------------------------------------------------------------


def formula(code: int) -> float:
    """The value of an E4M3 code: bias 7, subnormals, no infinity."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_every_code_of_fp8_has_the_value_of_the_formula():
    np.testing.assert_array_equal(e4m3(), np.array([formula(code) for code in range(256)], np.float32))
    assert np.signbit(e4m3()[128]) and e4m3()[126] == 448


def test_fp8_codes_are_torchs():
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(e4m3(), codes.float().numpy())


@pytest.fixture
def fp8(raw, tmp_path):
    return fp8_folder(raw, tmp_path / "fp8")


@pytest.mark.parametrize("scales", [mx.float32, mx.bfloat16])
def test_fp8_matrices_are_codes_times_the_factors_of_their_blocks(raw, tmp_path, monkeypatch, scales):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 40_000)  # chunks that end in the middle of blocks
    source = fp8_folder(raw, tmp_path / "fp8", scales)
    after = arrays_of(unpacked(source, tmp_path / "out", dtype="float32"))
    checkpoint, before = open_checkpoint(source, fp8=True), arrays_of(raw)
    assert len(checkpoint.block_scales) == 3 * 6 + 7 + 7
    data = (source / "model.safetensors").read_bytes()
    for name, entry in checkpoint.block_scales.items():
        weight = checkpoint.entries[name]
        codes = np.frombuffer(data, np.uint8, weight.nbytes, weight.start).reshape(weight.shape)
        width = 4 if entry.dtype == "F32" else 2
        factors = mx.array(np.frombuffer(data, f"<u{width}", entry.nbytes // width, entry.start).reshape(entry.shape))
        factors = np.array(mx.view(factors, scales).astype(mx.float32))
        whole = np.kron(factors, np.ones((128, 128), np.float32))[: weight.shape[0], : weight.shape[1]]
        np.testing.assert_array_equal(np.array(after[name]), e4m3()[codes] * whole)
        assert largest(after[name], before[name]) < np.abs(np.array(before[name].astype(mx.float32))).max() / 16
    assert mx.array_equal(after[f"{LAYER}linear_attn.in_proj_a.weight"].astype(mx.bfloat16), before[
        f"{LAYER}linear_attn.in_proj_a.weight"
    ])  # fmt: skip


def test_fp8_matrices_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from safetensors.torch import load_file

    config = changed(geometry("tiny"), intermediate_size=384)  # transformers wants blocks to fill a matrix
    raw = write_random_checkpoint(tmp_path / "raw", config, vision=False, mtp=False)
    tensors = load_file(fp8_folder(raw, tmp_path / "fp8") / "model.safetensors")
    after = arrays_of(unpacked(tmp_path / "fp8", tmp_path / "out"))
    for name in (DOWN, f"{LAYER}linear_attn.out_proj.weight", f"{LAYER}mlp.up_proj.weight"):
        parts = {"weight": tensors[name], "weight_scale_inv": tensors[f"{name}_scale_inv"]}
        theirs = integration.Fp8Dequantize(None).convert(parts)["weight"].to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(np.array(after[name].astype(mx.float32)), theirs)


def test_converted_fp8_folder_says_nothing_of_fp8(fp8, tmp_path):
    plain = read_json(unpacked(fp8, tmp_path / "plain") / "config.json")
    assert "quantization" not in plain and "quantization_config" not in plain
    packed = read_json(convert(fp8, tmp_path / "packed", quantize=True) / "config.json")
    assert packed["quantization_config"] == packed["quantization"] and packed["quantization"]["bits"] == 4
    assert logits(tmp_path / "packed").shape == (1, 7, 1024)


def test_load_refuses_an_fp8_folder_and_names_the_converter(fp8):
    with refused("fp8_not_runnable", "FP8", "mlx_qwen35.convert", "--hf-path"):
        load(fp8)


def test_nan_code_of_fp8_is_refused(fp8, tmp_path):
    entry = open_checkpoint(fp8, fp8=True).entries[DOWN]
    file = fp8 / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[entry.start + 5], data[entry.start + 9000] = 0x7F, 0xFF
    file.write_bytes(data)
    with refused("weights_not_finite", "2", "114688", DOWN):
        convert(fp8, tmp_path / "out", quantize=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"weight_block_size": [64, 128]}, "tensors_mismatch"),
        ({"weight_block_size": [128]}, "config_field_invalid"),
        ({"quant_method": "other"}, "quantization_unsupported"),
    ],
)
def test_fp8_config_that_contradicts_the_factors_is_refused(fp8, tmp_path, change, code):
    config = read_json(fp8 / "config.json")
    config["quantization_config"] |= change
    (fp8 / "config.json").write_text(json.dumps(config))
    with refused(code):
        convert(fp8, tmp_path / "out")


# --- folders of MLX programs -----------------------------------------------------------------------------------------


def test_unquantized_mlx_folder_becomes_the_raw_one(source_of, tmp_path):
    source = source_of("float32")
    before, after = arrays_of(source), arrays_of(unpacked(mlx_layout(source, tmp_path / "mlx"), tmp_path / "out"))
    assert set(after) == set(before)  # with the names of Hugging Face
    assert all(after[name].shape == array.shape for name, array in before.items())
    assert [name for name, array in before.items() if largest(after[name], array) > 1e-7] == []
    assert mx.array_equal(after["model.visual.patch_embed.proj.weight"], before["model.visual.patch_embed.proj.weight"])
    assert open_checkpoint(tmp_path / "out").raw


def test_folded_norms_are_taken_apart_exactly(raw, tmp_path):
    folder = mlx_layout(raw, tmp_path / "mlx")
    assert mx.array_equal(logits(unpacked(folder, tmp_path / "out")), logits(folder))
    exact = open_checkpoint(tmp_path / "out").fp32_original
    assert f"{LAYER}input_layernorm.weight" in exact
    stored = arrays_of(tmp_path / "out")[f"{FP32_ORIGINAL}{LAYER}input_layernorm.weight"]
    folded = arrays_of(folder)["language_model.model.layers.0.input_layernorm.weight"]
    assert mx.array_equal(stored, folded.astype(mx.float32) - 1)


@pytest.fixture(scope="module")
def by_mlx_lm():
    pytest.importorskip("mlx_lm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm.convert import convert as theirs
    return theirs


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_packed_folder_of_mlx_lm_is_copied_bit_for_bit(by_mlx_lm, raw, tmp_path, mode):
    by_mlx_lm(str(raw), str(tmp_path / "theirs"), quantize=True, q_mode=mode)
    convert(tmp_path / "theirs", tmp_path / "out")
    before, after = open_checkpoint(tmp_path / "theirs"), open_checkpoint(tmp_path / "out")
    theirs, ours = arrays_of(tmp_path / "theirs"), arrays_of(tmp_path / "out")
    packed = [name for name in before.entries if name.endswith(".scales")]
    assert len(packed) == 32 and after.raw and not before.raw
    for name in packed:
        for part in ("weight", "scales", "biases")[: 3 if mode == "affine" else 2]:
            stored = name.removesuffix("scales") + part
            assert mx.array_equal(ours[after.entries[stored].stored_name], theirs[before.entries[stored].stored_name])
    assert mx.array_equal(logits(tmp_path / "out"), logits(tmp_path / "theirs"))


def test_packed_tower_and_draft_head_of_an_mlx_layout_are_copied(raw, tmp_path):
    ours = nearest(raw, tmp_path / "ours", quantize=True, q_vision_bits=4)
    theirs = mlx_layout(ours, tmp_path / "mlx")
    config = read_json(theirs / "config.json")
    (theirs / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "mlx_qwen35"}))
    before, after = arrays_of(ours), arrays_of(convert(theirs, tmp_path / "out"))
    packed = [name.removesuffix("scales") for name in before if name.endswith(".scales")]
    assert {name.split(".")[0] for name in packed} == {"model", "mtp"} and any("visual" in name for name in packed)
    for stem in packed:
        assert all(mx.array_equal(before[stem + part], after[stem + part]) for part in ("weight", "scales", "biases"))
    assert read_json(tmp_path / "out" / "config.json")["quantization"] == config["quantization"]
    assert mx.array_equal(logits(tmp_path / "out"), logits(theirs))


# --- packed sources --------------------------------------------------------------------------------------------------


@pytest.mark.core(1)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"recipe": "4bit"}, {"quantize": True, "q_mode": "mxfp4"},
        pytest.param({"dtype": "float16"}, marks=pytest.mark.full),
        pytest.param({"quantize": True}, marks=pytest.mark.full),
        pytest.param({"quantize": True, "dtype": "float32", "q_vision_bits": 0}, marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_converting_a_converted_folder_with_nothing_to_change_is_the_identity(raw, tmp_path, options):
    once = convert(raw, tmp_path / "once", **options)
    assert files_of(convert(once, tmp_path / "again")) == files_of(once)
    assert files_of(convert(once, tmp_path / "same", **options)) == files_of(once)


def test_packed_parts_are_copied_whatever_the_chunks(raw, tmp_path, monkeypatch):
    once = convert(raw, tmp_path / "once", quantize=True)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 3333)
    assert files_of(convert(once, tmp_path / "again")) == files_of(once)


def test_other_dtype_changes_scales_and_not_codes(raw, tmp_path):
    once = convert(raw, tmp_path / "once", quantize=True)
    before, after = arrays_of(once), arrays_of(convert(once, tmp_path / "half", dtype="float16"))
    for name in [name for name in before if FP32_ORIGINAL + name not in before]:
        array = before[name]
        expected = array.astype(mx.float16) if array.dtype == mx.bfloat16 else array
        assert mx.array_equal(after[name], expected) and after[name].dtype == expected.dtype, name


def test_packing_anew_warns_and_measures_against_the_packed_source(raw, tmp_path):
    four = nearest(raw, tmp_path / "four", quantize=True, q_vision_bits=0)
    with pytest.warns(UserWarning, match=r"four is already quantized \(4-bit affine\) and 40 of its matrices"):
        report = converted(four, tmp_path / "eight", quantize=True, q_bits=8, rounding="nearest", q_vision_bits=0)
    checkpoint = open_checkpoint(tmp_path / "eight")
    assert checkpoint.quantization(DOWN) == Quantization(64, 8, "affine")
    direct = converted(raw, tmp_path / "direct", quantize=True, rounding="nearest", q_vision_bits=0).errors[DOWN]
    assert 0 < report.errors[DOWN].relative < direct.relative / 50


def test_recipe_that_packs_nothing_unpacks(raw, tmp_path):
    four = nearest(raw, tmp_path / "four", quantize=True)
    plain = convert(four, tmp_path / "plain", recipe="bf16")
    packed, weight = arrays_of(four), arrays_of(plain)[DOWN]
    parts = [packed[DOWN.removesuffix("weight") + part] for part in ("weight", "scales", "biases")]
    expected = mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), group_size=64, bits=4)
    assert mx.array_equal(weight, expected.astype(mx.bfloat16)) and weight.dtype == mx.bfloat16
    assert not open_checkpoint(plain).config.quantization


@pytest.mark.parametrize(
    ("mtp", "vision"),
    [(True, True), (False, False), *(pytest.param(m, not m, marks=pytest.mark.full) for m in (True, False))],
)
def test_raw_or_converted_with_and_without_vision_and_draft_head_gives_the_same_logits(tmp_path, mtp, vision):
    raw = write_random_checkpoint(tmp_path / "raw", geometry("tiny"), mtp=mtp, vision=vision)
    once = unpacked(raw, tmp_path / "once")
    folders = [raw, once, unpacked(once, tmp_path / "again")]
    first, *others = (logits(folder) for folder in folders)
    assert all(mx.array_equal(first, other) for other in others)
    reference = write_random_checkpoint(tmp_path / "reference", geometry("tiny"), mtp=False, vision=False)
    assert mx.array_equal(first, logits(reference))
    for folder in folders:
        checkpoint = open_checkpoint(folder)
        assert (checkpoint.has("model.visual."), checkpoint.has("mtp.")) == (vision, mtp)


def test_packed_tower_loads_from_an_mlx_layout(source_of, tmp_path):
    folder = convert(mlx_layout(source_of("float32"), tmp_path / "mlx"), tmp_path / "out", quantize=True)
    tower = load_vision_encoder(open_checkpoint(folder), mx.float32)
    assert tower is not None


def test_nan_in_a_packed_sources_scales_is_refused(raw, tmp_path):
    source = shutil.copytree(convert(raw, tmp_path / "four", quantize=True), tmp_path / "copy")
    scales = open_checkpoint(source).entries[DOWN.replace("weight", "scales")]
    file = bytearray(scales.file.read_bytes())
    file[scales.start : scales.start + 2] = b"\xc0\x7f"
    scales.file.write_bytes(file)
    for options in ({}, {"recipe": "bf16"}):
        with refused("weights_not_finite", "64", "114688", DOWN):
            convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
