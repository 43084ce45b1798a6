"""Folders as other programs leave them: which files are read, under which names, and what is said of the others."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_text_model
from geometries import changed
from refusing import refused

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import hugging_face_name
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.load import choose_dtype, load_model

SMALL = changed(
    geometry("tiny"), num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], intermediate_size=128
)
TEXT = "model.language_model."
EMBEDDING = f"{TEXT}embed_tokens.weight"
UP = f"{TEXT}layers.0.mlp.up_proj.weight"
IDS = mx.array([[1, 5, 9, 200, 3]])

Arrays = dict[str, mx.array]


@pytest.fixture(scope="module")
def raw(checkpoint_folder) -> Path:
    return checkpoint_folder(SMALL, 3, mtp=False, vision=False)


@pytest.fixture(scope="module")
def arrays(raw) -> Arrays:
    (file,) = raw.glob("*.safetensors")
    return mx.load(str(file))


@pytest.fixture(scope="module")
def expected(raw) -> mx.array:
    return load_text_model(raw)(IDS)


@pytest.fixture
def written(tmp_path) -> Callable[..., Path]:
    """(tensors, config = SMALL, name of the file = model.safetensors) -> a folder with these."""

    def write(arrays: Arrays, config: dict[str, Any] = SMALL, file: str = "model.safetensors") -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        mx.save_safetensors(str(folder / file), arrays, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def same(folder: Path, expected: mx.array) -> bool:
    return bool(mx.array_equal(load_text_model(folder)(IDS), expected))


def index(folder: Path, *files: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(files)}}))


# --- which files -----------------------------------------------------------------------------------------------------


def test_model_safetensors_goes_before_an_index_that_is_left_of_older_shards(arrays, expected, written):
    old = {name: array * 0 for name, array in arrays.items()}
    written(old, file="model-00001-of-00001.safetensors")
    folder = written(arrays)
    index(folder, "model-00001-of-00001.safetensors")
    assert same(folder, expected)
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert same(folder, expected)


def test_an_index_beside_model_safetensors_is_not_even_opened(arrays, expected, written):
    folder = written(arrays)
    (folder / INDEX).write_text("no JSON")
    assert same(folder, expected)


@pytest.mark.parametrize("other", ["consolidated.safetensors", "other.safetensors", "model-00001-of-00002.safetensors"])
def test_other_files_beside_model_safetensors_are_not_read(other, arrays, expected, written):
    folder = written(arrays)
    shutil.copy(folder / "model.safetensors", folder / other)
    assert same(folder, expected)


def test_files_in_a_subfolder_are_read_where_the_index_names_them(arrays, expected, written):
    folder = written(arrays)
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "a.safetensors")
    index(folder, "weights/a.safetensors", "./weights/a.safetensors")
    assert same(folder, expected)


@pytest.mark.parametrize("name", ["../other.safetensors", "a/../../other.safetensors", "/other.safetensors", ".."])
def test_an_index_does_not_lead_out_of_the_folder(name, arrays, written, tmp_path):
    folder = written(arrays)
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    index(folder, name if name != "/other.safetensors" else str(tmp_path / "other.safetensors"))
    with refused("path_outside_folder", folder / INDEX):
        open_checkpoint(folder)


@pytest.mark.parametrize("shards", [False, True])
def test_files_that_are_links_as_in_the_hubs_cache_are_read(shards, arrays, expected, written, tmp_path):
    folder = written(arrays, file="a.safetensors" if shards else "model.safetensors")
    for name in ("config.json", "a.safetensors" if shards else "model.safetensors"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    if shards:
        index(folder, "a.safetensors")
    assert same(folder, expected)


@pytest.mark.parametrize("names", [["x" * 300 + ".safetensors"], ["\udc80"], [f"{i}.safetensors" for i in range(99)]])
def test_an_index_of_files_that_are_not_there_is_one_sentence(names, arrays, written):
    folder = written(arrays, file="a.safetensors")
    index(folder, *names)
    with refused("weights_missing", folder / INDEX) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value).encode("utf-8", "replace")) < 700


@pytest.mark.parametrize(
    "held", ["other.safetensors", "model-00001-of-00002.safetensors", "model.gguf", "pytorch_model.bin", "weights.npz"]
)
def test_a_folder_without_weights_that_are_read_says_what_it_holds(held, raw, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(raw / "config.json", folder)
    (folder / held).write_bytes(b"x")
    with refused("weights_missing", held, "model.safetensors", INDEX):
        open_checkpoint(folder)


def test_a_folder_of_gguf_files_alone_is_told_of(tmp_path):
    (tmp_path / "Qwen3.5-4B-Q4_K_M.gguf").write_bytes(b"GGUF")
    with refused("weights_missing", "Qwen3.5-4B-Q4_K_M.gguf"):
        open_checkpoint(tmp_path)


FILES = ("config.json", "generation_config.json", "model.safetensors", INDEX, "tokenizer.json", "chat_template.jinja")


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in FILES for kind in ("folder", "dangling")), (FILES[0], "loop"), (FILES[2], "pipe")],
)
def test_a_name_of_a_checkpoint_that_is_no_file_is_told(name, kind, arrays, written):
    folder = written(arrays)
    (folder / name).unlink(missing_ok=True)
    make = {
        "folder": lambda path: path.mkdir(),
        "dangling": lambda path: path.symlink_to("absent/blob"),
        "loop": lambda path: path.symlink_to(path),
        "pipe": os.mkfifo,
    }
    make[kind](folder / name)
    with refused("file_unreadable", folder / name):
        open_checkpoint(folder)


@pytest.mark.parametrize("link", [False, True])
def test_a_shard_that_is_no_file_is_told(link, arrays, written):
    folder = written(arrays, file="a.safetensors")
    index(folder, "a.safetensors", "b.safetensors")
    (folder / "b.safetensors").symlink_to("absent") if link else (folder / "b.safetensors").mkdir()
    with refused("file_unreadable", folder / "b.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("link", [False, True])
def test_a_draft_head_that_is_no_file_is_left_out_and_told(link, arrays, expected, written):
    folder = written(arrays)
    (folder / "mtp.safetensors").symlink_to("absent") if link else (folder / "mtp.safetensors").mkdir()
    assert "mtp.safetensors" in open_checkpoint(folder).mtp_head_fault
    assert same(folder, expected)


@pytest.mark.parametrize(
    "files", [["adapter_config.json", "adapter_model.safetensors"], ["adapters.safetensors"], ["adapter_model.bin"]]
)
@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_folder_is_called_one(config, files, raw, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    if config:
        shutil.copy(raw / "config.json", folder)
    with refused("adapter_unmerged", folder, files[0]):
        open_checkpoint(folder)


@pytest.mark.parametrize("key", ["base_model_name_or_path", "model"])
def test_an_adapters_folder_says_which_model_it_was_trained_on_and_how_to_make_one_of_both(key, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({key: "Qwen/Qwen3.5-4B"}))
    with refused("adapter_unmerged", "Qwen/Qwen3.5-4B", f"mlx_qwen35.convert --hf-path MODEL --adapter {tmp_path}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("rename", [
    lambda name: name.replace(".weight", ".lora_A.default.weight"), lambda name: name.replace(".weight", ".lora_a"),
    lambda name: f"base_model.model.{name}",
])  # fmt: skip
def test_adapter_tensors_among_the_weights_are_called_so(rename, arrays, written):
    with refused("adapter_unmerged", rename(UP)):
        open_checkpoint(written({**arrays, rename(UP): mx.zeros((4, 4))}))


def test_a_whole_model_beside_what_is_left_of_its_adapter_is_read(arrays, expected, written):
    folder = written(arrays)
    (folder / "adapter_config.json").write_text("{}")
    assert same(folder, expected)


def test_a_local_folder_with_the_name_of_the_bundled_model_is_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = resolve("nano")
    (tmp_path / "nano").mkdir()
    assert resolve("nano") == bundled  # any folder of that name, as of examples here
    (tmp_path / "nano" / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"\./nano"):
        assert resolve("nano") == bundled
    assert resolve("./nano").samefile(tmp_path / "nano")


# --- tied or not -----------------------------------------------------------------------------------------------------


def tied(outer: bool | None, inner: bool | None) -> dict[str, Any]:
    config = json.loads(json.dumps(SMALL))
    for part, value in ((config, outer), (config["text_config"], inner)):
        part.pop("tie_word_embeddings", None)
        part |= {} if value is None else {"tie_word_embeddings": value}
    return config


@pytest.mark.parametrize("inner", [True, False, None])
def test_a_missing_head_is_the_embedding_where_the_outer_field_says_so(inner, arrays, expected, written):
    assert same(written(arrays, tied(True, inner)), expected)
    with refused("tensors_mismatch", "lm_head.weight"):
        open_checkpoint(written(arrays, tied(False, inner)))


HEADS = ["lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight"]


@pytest.mark.parametrize(
    ("name", "tie"),
    [
        *((name, (True, True)) for name in HEADS),
        *((HEADS[0], tie) for tie in ((True, False), (False, True), (False, False))),
    ],
)
def test_a_stored_head_that_differs_is_used_whatever_is_said(tie, name, arrays, expected, written):
    folder = written({**arrays, name: arrays[EMBEDDING] * 2}, tied(*tie))
    assert mx.allclose(load_text_model(folder)(IDS), 2 * expected, rtol=1e-5, atol=1e-5)
    assert not open_checkpoint(folder).config.text.tie_word_embeddings


def test_a_head_that_differs_in_its_last_number_is_used(arrays, written, monkeypatch):
    monkeypatch.setattr("mlx_qwen35.checkpoint.tensors.PIECE", 100_000)
    values = np.array(arrays[EMBEDDING].astype(mx.float32))
    values[-1, -1] += 1
    folder = written({**arrays, "lm_head.weight": mx.array(values).astype(mx.bfloat16)})
    assert not open_checkpoint(folder).config.text.tie_word_embeddings


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_stored_head_that_repeats_the_embedding_takes_no_memory(dtype, name, arrays, expected, written):
    folder = written({**arrays, name: arrays[EMBEDDING].astype(dtype)})
    assert open_checkpoint(folder).config.text.tie_word_embeddings and same(folder, expected)


def test_a_head_alone_is_the_embedding_too(arrays, expected, written):
    rest = {name: array for name, array in arrays.items() if name != EMBEDDING}
    assert same(written({**rest, "lm_head.weight": arrays[EMBEDDING]}), expected)


@pytest.mark.parametrize("repeated", [True, False])
def test_packed_heads_are_compared_part_by_part(repeated, arrays, written):
    def packed(array: mx.array, module: str) -> Arrays:
        parts = (f"{module}.{part}" for part in ("weight", "scales", "biases"))
        return dict(zip(parts, mx.quantize(array), strict=True))

    embedding = arrays[EMBEDDING]
    parts = packed(embedding, EMBEDDING.removesuffix(".weight"))
    parts |= packed(embedding if repeated else embedding * 2, "lm_head")
    folder = written({**arrays, **parts}, SMALL | {"quantization": {"group_size": 64, "bits": 4}})
    assert open_checkpoint(folder).config.text.tie_word_embeddings is repeated
    load_text_model(folder)


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = {
    "AutoModel": lambda name: name.removeprefix("model."),
    "one prefix more": lambda name: name.replace(TEXT, f"{TEXT}model."),
    "model.model": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_names_of_other_classes_are_known(rename, arrays, expected, written):
    folder = written({rename(name): array for name, array in arrays.items()})
    assert same(folder, expected)


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_names_of_a_tower_are_known_by_the_same_rule(rename):
    for name in ("model.visual.blocks.0.norm1.bias", "model.visual.merger.norm.weight", f"{TEXT}norm.weight"):
        assert hugging_face_name(rename(name)) == name


@pytest.mark.parametrize("prefix", ["", "model.", TEXT])
def test_a_text_model_alone_is_read_by_bare_names_too(prefix, arrays, expected, written):
    text = {name.replace(TEXT, prefix): array for name, array in arrays.items() if name.startswith(TEXT)}
    assert same(written(text, SMALL["text_config"]), expected)


SPARE = [
    f"{TEXT}rotary_emb.inv_freq", f"{TEXT}rotary_emb.original_inv_freq", "model.visual.rotary_pos_emb.inv_freq",
    f"{TEXT}layers.1.self_attn.rotary_emb.inv_freq", f"{TEXT}layers.1.self_attn.k_scale", "layers.1.self_attn.v_scale",
    f"{TEXT}layers.1.self_attn.k_proj.k_scale", f"{TEXT}layers.1.self_attn.attn.q_scale", "model.position_ids",
]  # fmt: skip


def test_spare_tensors_are_passed_over(arrays, expected, written):
    folder = written({**arrays, **{name: mx.ones((4,)) for name in SPARE}})
    assert same(folder, expected)
    assert not set(open_checkpoint(folder).entries) & set(SPARE)


def test_parts_that_the_configuration_does_not_have_are_passed_over(checkpoint_folder, expected, written):
    (file,) = checkpoint_folder(SMALL, 3).glob("*.safetensors")
    text = changed(SMALL, mtp_num_hidden_layers=0)["text_config"]
    assert {name.partition(".")[0] for name in mx.load(str(file))} == {"model", "mtp"}
    folder = written(mx.load(str(file)), text)
    assert {name for name in open_checkpoint(folder).entries if not name.startswith(TEXT)} == set()
    assert same(folder, expected)


def test_any_other_tensor_is_refused(arrays, written):
    with refused("tensors_mismatch", f"{TEXT}more.weight"):
        open_checkpoint(written({**arrays, f"{TEXT}more.weight": mx.zeros((2,))}))


# --- packings of other programs --------------------------------------------------------------------------------------


def packed(arrays: Arrays, suffixes: list[str], kept: bool = False, dtype: mx.Dtype = mx.int32) -> Arrays:
    """The MLP's matrices as other programs store them: parts of these names in their place, or beside what is kept."""
    found = {}
    for name, array in arrays.items():
        if ".mlp." not in name:
            found[name] = array
            continue
        stem = name.removesuffix("weight")
        found |= {name: mx.zeros((4, 4), mx.uint8)} if kept else {}
        found |= {f"{stem}{suffix}": mx.zeros((4, 4), dtype) for suffix in suffixes}
    return found


CLAIMS = {
    "gptq": ["qweight", "qzeros", "scales", "g_idx"], "awq": ["qweight", "qzeros", "scales"],
    "auto-round": ["qweight", "qzeros", "scales"], "hqq": ["W_q"], "quanto": ["weight._data", "weight._scale"],
    "torchao": ["_weight_qdata", "_weight_scale"], "aqlm": ["codes", "codebooks", "scales"], "mxfp4": ["weight_blocks"],
    "compressed-tensors": ["weight_packed", "weight_scale"], "fbgemm_fp8": ["weight", "weight_scale"],
}  # fmt: skip


@pytest.mark.parametrize(("method", "where"), [*((method, "top") for method in CLAIMS), ("gptq", "text_config")])
def test_another_programs_packing_is_named_by_what_the_configuration_says(method, where, arrays, written):
    claim = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}}
    config = SMALL | claim if where == "top" else changed(SMALL, **claim)
    folder = written(packed(arrays, CLAIMS[method]), config)
    for fp8 in (False, True):  # to run it, and to convert it
        with refused("quantization_unsupported", method) as caught:
            open_checkpoint(folder, fp8=fp8)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "suffixes", "kept"),
    [
        ("bitsandbytes", ["weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"], True),
        ("bitsandbytes", ["SCB"], True), ("gptq", ["qweight", "g_idx"], False), ("awq", ["qweight", "qzeros"], False),
        ("compressed-tensors", ["weight_packed"], False), ("modelopt", ["weight_scale", "weight_scale_2"], True),
        ("FP8", ["weight_scale", "input_scale"], True), ("hqq", ["W_q"], False),
    ],
)  # fmt: skip
def test_a_packing_that_no_file_tells_is_named_by_its_tensors(name, suffixes, kept, arrays, written):
    with refused("quantization_unsupported", name):
        open_checkpoint(written(packed(arrays, suffixes, kept)))


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "modelopt"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq"), ("quant_config.json", {"w_bit": 4}, "awq"),
    ],
)  # fmt: skip
def test_a_packing_is_named_by_a_file_beside_the_configuration(file, content, name, arrays, written):
    folder = written(packed(arrays, ["unheard_of"]))
    (folder / file).write_text(json.dumps(content))
    with refused("quantization_unsupported", name, file):
        open_checkpoint(folder)


def test_a_claim_of_old_bitsandbytes_without_a_method_is_named(arrays, written):
    config = SMALL | {"quantization_config": {"load_in_4bit": True}}
    with refused("quantization_unsupported", "bitsandbytes"):
        open_checkpoint(written(packed(arrays, ["unheard_of"], True), config))


def test_a_claim_that_is_left_of_weights_that_are_whole_again_is_no_reason_to_refuse(arrays, expected, written):
    config = SMALL | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert same(written(arrays, config), expected)


def retyped(file: Path, name: str, dtype: str) -> None:
    """Let a header say that a tensor is of another dtype of the same width."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("dtype", ["U16", "I16"])
@pytest.mark.parametrize("name", [EMBEDDING, f"{TEXT}norm.weight"])
def test_weights_of_another_kind_are_refused_before_anything_is_read(name, dtype, arrays, written):
    folder = written(arrays)
    retyped(folder / "model.safetensors", name, dtype)
    with refused("dtype_unsupported", name, dtype):
        open_checkpoint(folder)


@pytest.mark.parametrize(("part", "dtype"), [("weight", "F32"), ("weight", "I32"), ("scales", "I16")])
def test_parts_of_packed_weights_of_another_kind_are_refused(part, dtype, arrays, written):
    stem = UP.removesuffix("weight")
    parts = dict(zip((f"{stem}weight", f"{stem}scales", f"{stem}biases"), mx.quantize(arrays[UP]), strict=True))
    folder = written({**arrays, **parts}, SMALL | {"quantization": {"group_size": 64, "bits": 4}})
    open_checkpoint(folder)
    retyped(folder / "model.safetensors", stem + part, dtype)
    with refused("dtype_unsupported", stem + part, dtype):
        open_checkpoint(folder)


def test_fp8_without_factors_of_blocks_is_called_so(arrays, written):
    folder = written({**arrays, UP: mx.zeros(arrays[UP].shape, mx.uint8)})
    retyped(folder / "model.safetensors", UP, "F8_E4M3")
    with refused("quantization_unsupported", "FP8"):
        open_checkpoint(folder, fp8=True)


# --- float64 ---------------------------------------------------------------------------------------------------------


def in_float64(arrays: Arrays, folder: Path, names: Callable[[str], bool]) -> None:
    """Write model.safetensors with these tensors in float64 and the others as they are."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    position = 0
    for name, array in arrays.items():
        if names(name):
            dtype, part = "F64", np.array(array.astype(mx.float32)).astype(np.float64).tobytes()
        elif array.dtype == mx.float32:
            dtype, part = "F32", np.array(array).tobytes()
        else:
            dtype, part = "BF16", np.array(mx.view(array, mx.uint16)).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [position, position + len(part)]}
        parts.append(part)
        position += len(part)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


@pytest.mark.parametrize("names", [lambda name: True, lambda name: name == UP, lambda name: "norm" in name])
def test_float64_is_read_as_float32(names, arrays, expected, written):
    folder = written(arrays)
    in_float64(arrays, folder, names)
    assert same(folder, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float64_is_cast_as_the_same_numbers_in_float32_are(dtype, arrays, written):
    folder = written({name: array.astype(mx.float32) for name, array in arrays.items()})
    dtype = choose_dtype(open_checkpoint(folder), dtype)
    before = load_model(open_checkpoint(folder), dtype, "float32")(IDS)
    in_float64(arrays, folder, lambda name: True)
    assert mx.array_equal(load_model(open_checkpoint(folder), dtype, "float64")(IDS), before)
