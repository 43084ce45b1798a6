"""Broken or unsuitable checkpoints are refused before they are used: with the rule, what came, and what to do."""

import json
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import refusing
from conftest import load_text_model
from geometries import changed

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.load import load, load_model
from mlx_qwen35.machine import memory

SMALL = changed(geometry("tiny"), num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
NORM = "model.language_model.layers.0.input_layernorm.weight"
CONV = "model.language_model.layers.0.linear_attn.conv1d.weight"


@pytest.fixture
def folder(checkpoint_copy) -> Path:
    """A whole checkpoint in one shard, to break."""
    return checkpoint_copy(SMALL, mtp=False, vision=False)


def shard(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def rewrite(folder: Path, change) -> None:
    """Let `change` alter the dict of tensors, and write them back."""
    arrays = dict(mx.load(str(shard(folder))))
    change(arrays)
    mx.eval(arrays)
    target = shard(folder)
    mx.save_safetensors(str(target.with_name("new.safetensors")), arrays)
    target.with_name("new.safetensors").replace(target)


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, code: str, *facts: object) -> str:
    """Opening is refused, see refusing.refused; the message."""
    with refusing.refused(code, *facts) as caught:
        open_checkpoint(folder)
    return str(caught.value)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "absent", "model_not_found")


def test_a_folder_without_weights(folder):
    shard(folder).unlink()
    (folder / INDEX).unlink()
    refused(folder, "weights_missing", folder, INDEX)


def test_a_shard_that_the_index_names_is_absent(checkpoint_copy):
    folder = checkpoint_copy(SMALL, mtp=False, vision=False, shard_bytes=1e6)
    name = sorted(folder.glob("*.safetensors"))[1].name
    (folder / name).unlink()
    refused(folder, "weights_missing", INDEX, name)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_without_weight_map(content, folder):
    (folder / INDEX).write_text(content)
    refused(folder, "index_invalid", INDEX, "weight_map")


def test_an_index_that_is_not_json(folder):
    (folder / INDEX).write_text("{")
    refused(folder, "json_invalid", INDEX)


# --- safetensors files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 9, 100, "header", "data", "last byte"])
def test_a_truncated_file(keep, folder):
    file = shard(folder)
    data = file.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    count = {"header": header - 1, "data": header + 1000, "last byte": len(data) - 1}.get(keep, keep)
    file.write_bytes(data[:count])
    refused(folder, "safetensors_truncated", str(file), count)


def test_a_file_with_bytes_after_its_tensors(folder):
    file = shard(folder)
    size = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(b"more")
    refused(folder, "safetensors_too_long", str(file), size, size + 4)


@pytest.mark.parametrize("length", [0, 2**40, 2**64 - 1])
def test_a_header_length_that_cannot_be(length, folder):
    file = shard(folder)
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(folder, "safetensors_truncated", str(file))


def corrupt_header(folder: Path, change) -> Path:
    """Replace the header by what `change` makes of its text."""
    file = shard(folder)
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = change(data[8 : 8 + length])
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return file


def broken_entry(**values):
    def change(header: bytes) -> bytes:
        parsed = json.loads(header)
        parsed[NORM] |= values
        return json.dumps(parsed).encode()

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.replace(b"{", b"[", 1),
        lambda header: b"\xff" + header[1:],
        lambda header: b"[1, 2]",
        lambda header: b'{"a": 3}',
        lambda header: header.replace(b"data_offsets", b"data_offset!"),
        broken_entry(dtype="F12"),
        broken_entry(shape=[3]),
        broken_entry(shape=None),
        broken_entry(data_offsets=[0]),
    ],
    ids=["brackets", "bytes", "list", "number", "key", "dtype", "size", "no shape", "one offset"],
)
def test_a_corrupted_header(change, folder):
    file = corrupt_header(folder, change)
    refused(folder, "safetensors_invalid", file)


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_a_tensor_of_another_shape(folder):
    rewrite(folder, lambda arrays: arrays.update({NORM: mx.zeros((255,), mx.bfloat16)}))
    refused(folder, "tensors_mismatch", "config.json", "1", NORM)


def test_a_missing_tensor(folder):
    rewrite(folder, lambda arrays: arrays.pop(NORM))
    refused(folder, "tensors_mismatch", "config.json", "1", NORM)


def test_an_unexpected_tensor(folder):
    rewrite(folder, lambda arrays: arrays.update({NORM.replace(".0.", ".2."): arrays[NORM]}))
    refused(folder, "tensors_mismatch", "config.json", "1", NORM.replace(".0.", ".2."))


def test_all_that_is_wrong_is_told_at_once_and_long_lists_are_cut(folder):
    def change(arrays):
        for name in [name for name in arrays if "layers.1." in name]:
            arrays[name.replace("layers.1.", "layers.7.")] = arrays.pop(name)
        arrays[NORM] = mx.zeros((1,))

    rewrite(folder, change)
    message = refused(folder, "tensors_mismatch", "11", "3", "1")
    assert len(message.splitlines()) == 4


def test_a_missing_head_of_an_untied_model(folder):
    edit_config(folder, tie_word_embeddings=False)
    refused(folder, "tensors_mismatch", "1", "lm_head.weight")


def test_an_incomplete_vision_tower(checkpoint_copy):
    folder = checkpoint_copy(SMALL, mtp=False)
    rewrite(folder, lambda arrays: arrays.pop("model.visual.blocks.1.attn.qkv.bias"))
    refused(folder, "tensors_mismatch", "1", "model.visual.blocks.1.attn.qkv.bias")


def test_an_incomplete_draft_head(checkpoint_copy):
    folder = checkpoint_copy(SMALL, vision=False)
    rewrite(folder, lambda arrays: arrays.pop("mtp.fc.weight"))
    refused(folder, "tensors_mismatch", "1", "mtp.fc.weight")


def test_a_tensor_under_two_names(folder):
    other = NORM.replace("model.language_model.", "language_model.model.")
    rewrite(folder, lambda arrays: arrays.update({other: arrays[NORM]}))
    refused(folder, "tensor_duplicate", NORM)


def test_a_float32_original_without_its_tensor(folder):
    rewrite(folder, lambda arrays: arrays.update({"mtp.float32.model.language_model.x": mx.zeros((2,))}))
    refused(folder, "tensors_mismatch", "mtp.float32.*", "model.language_model.x")


def test_scales_without_a_quantization_entry(folder):
    rewrite(folder, lambda arrays: arrays.update({"model.language_model.embed_tokens.scales": mx.zeros((1024, 4))}))
    refused(folder, "tensors_mismatch", "1", "model.language_model.embed_tokens.scales")


@pytest.mark.parametrize("suffix", [".input_layernorm.weight", ".linear_attn.conv1d.weight", ".linear_attn.A_log"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_small_tensor_that_is_not_finite(value, suffix, folder):
    name = f"model.language_model.layers.0{suffix}"

    def change(arrays):
        array = np.array(arrays[name].astype(mx.float32))
        array.flat[5] = value
        arrays[name] = mx.array(array).astype(arrays[name].dtype)

    rewrite(folder, change)
    checkpoint = open_checkpoint(folder)
    with refusing.refused("weights_not_finite", name, "1"):
        load_model(checkpoint, mx.float32, "tiny")


def test_a_scale_that_is_not_finite(folder):
    name = "model.language_model.layers.1.mlp.up_proj."

    def change(arrays):
        for key in [key for key in arrays if key.endswith("proj.weight") and arrays[key].ndim == 2]:
            parts = mx.quantize(arrays[key])
            arrays |= dict(zip((key, key[:-6] + "scales", key[:-6] + "biases"), parts, strict=True))
        arrays[f"{name}scales"] = mx.where(mx.arange(448)[:, None] == 9, mx.nan, arrays[f"{name}scales"])

    rewrite(folder, change)
    edit_config(folder, quantization={"group_size": 64, "bits": 4})
    with refusing.refused("weights_not_finite", f"{name}scales (4)"):
        load_text_model(folder)


def test_weights_of_integers_are_refused(folder):
    rewrite(folder, lambda arrays: arrays.update({NORM: mx.zeros((256,), mx.int16)}))
    refused(folder, "dtype_unsupported", NORM, "I16")


# --- layouts that contradict themselves -------------------------------------------------------------------------------


def test_conv_weights_of_both_layouts(checkpoint_copy):
    folder = checkpoint_copy(
        changed(SMALL, num_hidden_layers=3, layer_types=["linear_attention"] * 3), mtp=False, vision=False
    )
    rewrite(folder, lambda arrays: arrays.update({CONV: arrays[CONV].swapaxes(1, 2)}))
    refused(folder, "layout_mixed", "conv1d", "1", "4")


def test_a_tag_of_ours_on_a_folder_that_another_program_rewrote(folder):
    rewrite(folder, lambda arrays: arrays.update({CONV: mx.contiguous(arrays[CONV].swapaxes(1, 2))}))
    edit_config(folder, mlx_qwen35={"format": 1, "norms": "zero-centred"})
    refused(folder, "layout_tag_contradicted", "conv1d", "4", "1")


@pytest.mark.parametrize("tag", [{"format": 1, "norms": "shifted"}, {"format": 2, "norms": "zero-centred"}, {}])
def test_a_tag_of_ours_that_this_version_does_not_know(folder, tag):
    edit_config(folder, mlx_qwen35=tag)
    refused(folder, "layout_tag_unsupported", "mlx_qwen35", "1", tag)


def test_a_tag_of_ours_that_is_true(folder):
    edit_config(folder, mlx_qwen35={"format": 1, "norms": "zero-centred"})
    assert open_checkpoint(folder).raw


# --- options ----------------------------------------------------------------------------------------------------------


def test_load_refuses_an_unknown_dtype(folder):
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(memory.__file__).parent.parent / "nano" / file, folder)
    with refusing.refused("option_invalid", "float32", "float16", "bfloat16", "int4"):
        load(folder, dtype="int4")
