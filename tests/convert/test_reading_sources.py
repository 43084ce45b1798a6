"""Sources as other programs leave them: the converter reads the files, names and dtypes that the loader reads."""

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from converting import arrays_of, raw_bits, save
from geometries import changed
from refusing import refused

from mlx_qwen35.checkpoint.checkpoint import FP32_ORIGINAL, open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.fields import read_json
from mlx_qwen35.load import load_model

SMALL = changed(
    geometry("tiny"), num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], intermediate_size=128
)
TEXT = "model.language_model."
EMBEDDING = f"{TEXT}embed_tokens.weight"
NORM = f"{TEXT}layers.0.linear_attn.norm.weight"  # float32 in the published checkpoints
IDS = mx.array([[1, 5, 9, 200, 3]])


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    found = arrays_of(write_random_checkpoint(tmp_path_factory.mktemp("raw") / "raw", SMALL, mtp=False))
    mx.eval(found)
    return found


def folder_of(folder, arrays, config=SMALL):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    return folder


def converted(tmp_path, arrays, config=SMALL, recipe="bf16"):
    return convert(folder_of(tmp_path / "source", arrays, config), tmp_path / "out", recipe=recipe)


def names_in(folder) -> set[str]:
    return {name for name in arrays_of(folder) if not name.startswith(FP32_ORIGINAL)}


@pytest.mark.parametrize("rename", [
    lambda name: name.removeprefix("model."), lambda name: name.replace(TEXT, f"{TEXT}model."),
    lambda name: name.replace(TEXT, "model."),
], ids=["AutoModel", "one prefix more", "text class"])  # fmt: skip
def test_whatever_names_a_source_has_those_of_hugging_faces_class_are_written(rename, arrays, tmp_path):
    out = converted(tmp_path, {rename(name): array for name, array in arrays.items()})
    assert names_in(out) == set(arrays)
    after = arrays_of(out)
    assert all(mx.array_equal(after[name], array) for name, array in arrays.items() if name != NORM)


@pytest.mark.parametrize("prefix", ["", "model.", TEXT])
def test_a_text_model_alone_gets_the_names_of_its_class(prefix, arrays, tmp_path):
    text = {name.replace(TEXT, prefix): array for name, array in arrays.items() if name.startswith(TEXT)}
    out = converted(tmp_path, text, SMALL["text_config"])
    assert names_in(out) == {name.replace(TEXT, "model.") for name in arrays if name.startswith(TEXT)}
    open_checkpoint(out)


def test_spare_tensors_are_not_copied(arrays, tmp_path):
    spare = {f"{TEXT}rotary_emb.inv_freq": mx.ones(4), f"{TEXT}layers.1.self_attn.k_scale": mx.ones(1)}
    assert names_in(converted(tmp_path, {**arrays, **spare})) == set(arrays)


@pytest.mark.parametrize(("name", "recipe"), [("lm_head.weight", "4bit"), ("model.lm_head.weight", "bf16")])
def test_a_head_that_differs_is_kept_and_the_model_called_untied(name, recipe, arrays, tmp_path):
    out = converted(tmp_path, {**arrays, name: arrays[EMBEDDING] * 2}, recipe=recipe)
    config = read_json(out / "config.json")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert "lm_head.weight" in names_in(out)
    source, after = (load_model(open_checkpoint(f), mx.float32, "x")(IDS) for f in (tmp_path / "source", out))
    assert recipe == "4bit" or mx.abs(source - after).max() < 1e-2 * mx.abs(source).max()


def test_a_head_that_repeats_the_embedding_is_not_written(arrays, tmp_path):
    out = converted(tmp_path, {**arrays, "lm_head.weight": arrays[EMBEDDING].astype(mx.float32)})
    config = read_json(out / "config.json")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True
    assert names_in(out) == set(arrays)


def test_a_head_alone_is_written_as_the_embedding(arrays, tmp_path):
    rest = {name: array for name, array in arrays.items() if name != EMBEDDING}
    assert names_in(converted(tmp_path, {**rest, "lm_head.weight": arrays[EMBEDDING]})) == set(arrays)


def test_a_stale_index_and_other_files_are_not_read(arrays, tmp_path):
    folder = folder_of(tmp_path / "source", arrays)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}')
    (folder / "other.safetensors").write_bytes(b"x")
    assert names_in(convert(folder, tmp_path / "out", recipe="bf16")) == set(arrays)


@pytest.mark.parametrize(
    ("names", "recipe"),
    [(lambda name: True, "4bit"), (lambda name: name.endswith("norm.weight"), "bf16")],
    ids=["all", "norms"],
)
def test_float64_gives_the_bytes_that_float32_gives(names, recipe, arrays, tmp_path):
    wide = {name: array.astype(mx.float32) if names(name) else array for name, array in arrays.items()}
    expected = arrays_of(converted(tmp_path, wide, recipe=recipe))
    (tmp_path / "float64").mkdir()
    (tmp_path / "float64" / "config.json").write_text(json.dumps(SMALL))
    doubled = {n: ("F64", np.array(a).astype(np.float64)) if names(n) else raw_bits(a) for n, a in wide.items()}
    save(tmp_path / "float64" / "model.safetensors", doubled)
    after = arrays_of(convert(tmp_path / "float64", tmp_path / "out64", recipe=recipe))
    assert set(after) == set(expected)
    assert all(mx.array_equal(after[name], array) for name, array in expected.items())
    assert all(after[name].dtype == array.dtype for name, array in expected.items())


def test_float64_that_float32_does_not_hold_is_refused(arrays, tmp_path):
    folder = folder_of(tmp_path / "source", arrays)
    doubled = {name: raw_bits(array) for name, array in arrays.items()}
    values = np.array(arrays[EMBEDDING].astype(mx.float32)).astype(np.float64)
    values[3, 3] = 1e39
    save(folder / "model.safetensors", doubled | {EMBEDDING: ("F64", values)})
    with refused("weights_not_finite", EMBEDDING):
        convert(folder, tmp_path / "out", recipe="bf16")


def test_a_dtype_of_float64_in_the_configuration_becomes_float32(arrays, tmp_path):
    folder = folder_of(tmp_path / "source", arrays, changed(SMALL, dtype="float64"))
    out = convert(folder, tmp_path / "out", recipe="4bit")
    assert read_json(out / "config.json")["text_config"]["dtype"] == "float32"


def test_packings_of_other_programs_are_named(arrays, tmp_path):
    parts = {name.replace("weight", "qweight") if ".mlp." in name else name: a for name, a in arrays.items()}
    folder = folder_of(tmp_path / "source", parts, SMALL | {"quantization_config": {"quant_method": "gptq"}})
    with refused("quantization_unsupported", "gptq", folder):
        convert(folder, tmp_path / "out", recipe="bf16")


def test_a_header_that_lies_is_refused_before_anything_is_written(arrays, tmp_path):
    folder = folder_of(tmp_path / "source", arrays)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[EMBEDDING]["data_offsets"] = [0, header[EMBEDDING]["data_offsets"][1]]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with refused("safetensors_invalid", file):
        convert(folder, tmp_path / "out", recipe="bf16")
    assert not (tmp_path / "out").exists()
