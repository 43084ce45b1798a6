"""Each rule of source and options: what is refused, with which code, and that nothing is written."""

import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
import refusing
from converting import mlx_layout

from mlx_qwen35.checkpoint.random import _random_tensor, geometry, write_random_checkpoint
from mlx_qwen35.convert import convert, stream

DOWN = "model.language_model.layers.1.mlp.down_proj.weight"


@pytest.fixture(name="refused")
def conversion_refused(tmp_path):
    """A function that runs a conversion, which must be refused (see refusing.refused) with nothing written."""

    def check(source, code, *facts, **options):
        out = tmp_path / "outputs" / "out"
        with refusing.refused(code, *facts):
            convert(source, out, **options)
        assert not out.parent.exists() or not any(out.parent.iterdir())

    return check


def source_with(folder, name, values, dtype=mx.bfloat16):
    """A random checkpoint in which some values of one tensor are replaced: {index: value}."""

    def tensor(key, shape):
        array = np.array(_random_tensor(key, shape).astype(mx.float32))
        if key == name:
            for at, value in values.items():
                array[at] = value
        return mx.array(array)

    return write_random_checkpoint(folder, geometry("tiny"), dtype=dtype, tensor=tensor)


@pytest.mark.parametrize("option", [{"q_bits": 4}, {"q_group_size": 64}, {"q_mode": "affine"}])
def test_quantization_option_without_quantize_is_refused(raw, refused, option):
    refused(raw, "option_no_effect", **option)


@pytest.mark.parametrize(
    "options",
    [
        {"q_bits": 7},
        {"q_bits": 0},
        {"q_group_size": 16},
        {"q_mode": "mxfp4", "q_bits": 8},
        {"q_mode": "nvfp4", "q_group_size": 64},
        {"q_mode": "gguf"},
    ],
)
def test_quantization_that_mlx_does_not_offer_is_refused(raw, refused, options):
    refused(raw, "quantization_invalid", quantize=True, **options)


@pytest.mark.parametrize("bits", [7, 1, -1])
def test_vision_bits_that_mlx_does_not_offer_are_refused(raw, refused, bits):
    refused(raw, "option_invalid", quantize=True, q_vision_bits=bits)


@pytest.mark.parametrize("bits", [8, 0])
def test_vision_bits_without_a_vision_tower_are_refused(refused, tmp_path, bits):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"), vision=False)
    refused(source, "option_no_effect", quantize=True, q_vision_bits=bits)


def test_matrix_narrower_than_its_groups_is_named(raw, refused):
    refused(raw, "quantization_unfit", "layers.0.mlp.down_proj.weight", "448", "128", quantize=True, q_group_size=128)


def test_unknown_dtype_is_refused(raw, refused):
    refused(raw, "option_invalid", dtype="int8")


def test_unknown_dtype_of_the_config_asks_for_the_option(refused, tmp_path):
    config = geometry("tiny")
    config["text_config"]["dtype"] = "int8"
    source = write_random_checkpoint(tmp_path / "raw", config)
    refused(source, "config_field_unsupported")
    convert(source, tmp_path / "out", dtype="float32")


def test_revision_of_a_local_folder_is_refused(raw, refused):
    refused(raw, "option_no_effect", revision="main")


@pytest.mark.core(1)
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.full), 4])
@pytest.mark.parametrize("quantize", [False, True])
def test_nan_and_infinity_are_counted_over_the_whole_tensor(refused, tmp_path, monkeypatch, quantize, threads):
    values = {(0, 3): np.nan, (100, 0): np.inf, (255, 447): -np.inf}
    source = source_with(tmp_path / "raw", DOWN, values)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(stream, "THREADS", threads)
    refused(source, "weights_not_finite", "3", DOWN, quantize=quantize)


@pytest.mark.parametrize(
    "name", ["model.visual.merger.norm.bias", "mtp.norm.weight", "model.language_model.layers.0.linear_attn.A_log"]
)
def test_nan_is_found_in_every_part_of_the_model(refused, tmp_path, name):
    refused(source_with(tmp_path / "raw", name, {1: np.nan}), "weights_not_finite", "1", name)


def test_float32_value_that_rounds_to_infinity_in_bfloat16_is_named(refused, tmp_path):
    source = source_with(tmp_path / "raw", DOWN, {(0, 0): 3.4e38}, dtype=mx.float32)
    refused(source, "weights_overflow", "1", DOWN, dtype="bfloat16")


@pytest.mark.parametrize("where", ["top", "text_config"])
@pytest.mark.parametrize("field", ["quantization", "quantization_config"])
@pytest.mark.parametrize("claim", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"bits": 4}])
def test_config_that_claims_a_quantization_of_plain_tensors_is_refused(raw, refused, tmp_path, where, field, claim):
    source = shutil.copytree(raw, tmp_path / "raw")
    config = json.loads((source / "config.json").read_text())
    (config if where == "top" else config[where])[field] = claim
    (source / "config.json").write_text(json.dumps(config))
    refused(source, "quantization_unsupported")


def test_format_tag_that_contradicts_the_layout_is_refused(raw, refused, tmp_path):
    source = mlx_layout(raw, tmp_path / "mlx")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"mlx_qwen35": {"format": 1, "norms": "zero-centred"}}))
    refused(source, "layout_tag_contradicted")


def test_weights_of_another_dtype_are_named(refused, tmp_path):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"), vision=False, mtp=False, shard_bytes=1)
    norm = "model.language_model.norm.weight"
    file = next(file for file in source.glob("*.safetensors") if norm in mx.load(str(file)))
    mx.save_safetensors(str(file), {norm: mx.zeros((256,), mx.int32)})
    refused(source, "dtype_unsupported", norm, "I32")


def test_source_that_shrinks_while_it_is_read_is_refused(refused, tmp_path, monkeypatch):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"))
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda *where: read(*where)[:-1])
    refused(source, "source_changed")
