"""Checkpoints as the several programs write them give the same model."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_text_model
from geometries import changed
from parity import cases
from refusing import refused

from mlx_qwen35.backend import CPU, CUDA, METAL, assume
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import is_zero_centred
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import is_matrix
from mlx_qwen35.load import load, load_vision_encoder
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.quantization import MODES, Quantization

# One program and the same numbers: only products of differently laid out arrays may round differently.
SAME = 2e-5
# Two programs in float32, as in the parity tests.
TOLERANCE = 1e-4

# Two layers, so that the many folders stay small; the intermediate size is a multiple of the largest group.
SMALL = changed(
    geometry("tiny"), num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], intermediate_size=512
)


def prompt(count: int = 40) -> mx.array:
    return mx.array(np.random.default_rng(6).integers(0, 900, (1, count)).astype(np.int32))


def logits(folder: Path) -> mx.array:
    """Of a prompt read at once and of some tokens read alone, which take other paths through packed matrices."""
    model = load_text_model(folder)
    cache = model.make_cache()
    parts = [model(prompt()[:, :37], cache), *(model(prompt()[:, t : t + 1], cache) for t in range(37, 40))]
    out = mx.concatenate(parts, axis=1)
    mx.eval(out)
    return out


def seen(folder: Path) -> mx.array:
    """The tower's embeddings of a random picture of 96 x 64."""
    checkpoint = open_checkpoint(folder)
    tower = load_vision_encoder(checkpoint, mx.float32)
    out = tower([patches_of_a_picture()], (6, 4))
    mx.eval(out)
    return out


def patches_of_a_picture() -> mx.array:
    return mx.array(np.random.default_rng(7).uniform(-1, 1, (1, 24, 1536)).astype(np.float32))


def difference(a: mx.array, b: mx.array) -> float:
    return float(np.nan_to_num(np.abs(np.array(a) - np.array(b)), nan=np.inf).max())


def tensors(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in mx.load(str(file)).items()}


def write_folder(folder: Path, config: dict[str, Any], arrays: dict[str, mx.array]) -> Path:
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_text_matrix(name: str, array: mx.array) -> bool:
    return name.startswith(("model.language_model.", "lm_head.")) and is_matrix(name, array.shape)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# --- emulations of other programs -------------------------------------------------------------------------------------


def mlx_lm_name(name: str) -> str:
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def mlx_vlm_name(name: str) -> str:
    return re.sub(r"^model\.visual\.", "vision_tower.", re.sub(r"^mtp\.", "language_model.mtp.", mlx_lm_name(name)))


Packing = Callable[[str], Quantization | None]


def as_converted(folder: Path, target: Path, rename: Callable[[str], str], packing: Packing | None = None) -> Path:
    """What an MLX program writes: other names, conv1d [C, K, 1], 1 + w in norms, packed matrices."""
    arrays: dict[str, mx.array] = {}
    quantization: dict[str, Any] = {}
    for name, array in tensors(folder).items():
        if name.endswith("conv1d.weight"):
            array = mx.contiguous(array.swapaxes(1, 2))
        elif name.endswith("patch_embed.proj.weight"):
            array = mx.contiguous(mx.moveaxis(array, 1, -1))
        elif is_zero_centred(name):
            array = array.astype(mx.float32) + 1.0  # in float32: what rounding it does is not the matter here
        packed = packing(name) if packing and is_text_matrix(name, array) else None
        if packed is None:
            arrays[rename(name)] = array
            continue
        form = {"group_size": packed.group_size, "bits": packed.bits, "mode": packed.mode}
        parts = mx.quantize(array, **form)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
            arrays[rename(name).removesuffix("weight") + suffix] = part
        quantization = quantization or dict(form)  # the first one is the default, the others override it
        if form != {key: quantization[key] for key in form}:
            quantization[rename(name).removesuffix(".weight")] = form
    config = config_of(folder) | ({"quantization": quantization} if quantization else {})
    return write_folder(target, config, arrays)


def dequantized(folder: Path, target: Path, packing: Packing) -> Path:
    """A raw folder in float32 whose matrices were packed and unpacked again."""
    arrays = {}
    for name, array in tensors(folder).items():
        packed = packing(name) if is_text_matrix(name, array) else None
        if packed:
            form = {"group_size": packed.group_size, "bits": packed.bits, "mode": packed.mode}
            weight, *scales = mx.quantize(array, **form)
            scales = [s.astype(mx.float32) if mx.issubdtype(s.dtype, mx.floating) else s for s in scales]
            array = mx.dequantize(weight, *scales, **form)
        arrays[name] = array.astype(mx.float32)
    return write_folder(target, config_of(folder), arrays)


def uniform(group_size: int, bits: int, mode: str = "affine") -> Packing:
    return lambda name: Quantization(group_size, bits, mode)


# --- names and layouts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(checkpoint_folder) -> Path:
    return checkpoint_folder(SMALL, 3)


@pytest.fixture(scope="module")
def raw_logits(raw) -> mx.array:
    return logits(raw)


@pytest.mark.parametrize("rename", [mlx_lm_name, mlx_vlm_name])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_converted_folder_equals_the_raw_one(rename, tied, checkpoint_folder, tmp_path):
    folder = checkpoint_folder(changed(SMALL, tie_word_embeddings=tied), 3)
    target = as_converted(folder, tmp_path / "converted", rename)
    assert open_checkpoint(folder).raw and not open_checkpoint(target).raw
    assert difference(logits(folder), logits(target)) < SAME


def test_a_tower_in_the_layout_of_mlx_vlm_sees_the_same(raw, tmp_path):
    target = as_converted(raw, tmp_path / "converted", mlx_vlm_name)
    assert difference(seen(raw), seen(target)) == 0


@pytest.mark.parametrize("vision", [True, False], ids=["vision", "no vision"])
@pytest.mark.parametrize("mtp", [True, False], ids=["mtp", "no mtp"])
@pytest.mark.parametrize("converted", [False, True], ids=["raw", "converted"])
def test_vision_and_mtp_tensors_change_nothing(converted, mtp, vision, raw, raw_logits, tmp_path):
    arrays = {
        name: array
        for name, array in tensors(raw).items()
        if (vision or not name.startswith("model.visual.")) and (mtp or not name.startswith("mtp."))
    }
    folder = write_folder(tmp_path / "raw", config_of(raw), arrays)
    if converted:
        folder = as_converted(folder, tmp_path / "converted", mlx_vlm_name)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.raw is not converted
    assert (checkpoint.has("mtp."), checkpoint.has("model.visual.")) == (mtp, vision)
    assert difference(raw_logits, logits(folder)) < SAME


def test_names_of_the_text_only_class_are_known(raw, raw_logits, tmp_path):
    arrays = {
        name.replace("model.language_model.", "model."): array
        for name, array in tensors(raw).items()
        if name.startswith("model.language_model.")
    }
    folder = write_folder(tmp_path / "text", config_of(raw)["text_config"], arrays)
    assert open_checkpoint(folder).config.vision is None
    assert difference(raw_logits, logits(folder)) == 0


def test_several_shards_are_one_checkpoint(raw, raw_logits, checkpoint_folder):
    folder = checkpoint_folder(SMALL, 3, shard_bytes=1e6)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert difference(raw_logits, logits(folder)) == 0


def test_files_beside_those_that_the_index_names_are_not_read(checkpoint_copy, raw_logits):
    folder = checkpoint_copy(SMALL, 3)
    (folder / "consolidated.safetensors").write_bytes(b"not a model")
    assert difference(raw_logits, logits(folder)) == 0


def test_a_folder_without_an_index_is_read(checkpoint_copy, raw_logits):
    folder = checkpoint_copy(SMALL, 3)
    (folder / INDEX).unlink()
    next(folder.glob("*.safetensors")).rename(folder / "model.safetensors")
    assert difference(raw_logits, logits(folder)) == 0


def test_a_head_that_repeats_a_tied_embedding_is_passed_over(raw, raw_logits, tmp_path):
    arrays = tensors(raw)
    arrays["lm_head.weight"] = mx.array(arrays["model.language_model.embed_tokens.weight"])
    assert difference(raw_logits, logits(write_folder(tmp_path / "both", config_of(raw), arrays))) == 0


def test_a_float32_original_is_used_in_place_of_its_rounded_copy(raw, raw_logits, tmp_path):
    arrays = tensors(raw)
    for name in [name for name in arrays if name.endswith("linear_attn.norm.weight")]:
        arrays[f"mtp.float32.{name}"] = arrays[name]
        arrays[name] = arrays[name].astype(mx.bfloat16)
    assert difference(raw_logits, logits(write_folder(tmp_path / "exact", config_of(raw), arrays))) == 0
    for name in [name for name in arrays if name.startswith("mtp.float32.")]:
        del arrays[name]
    assert difference(raw_logits, logits(write_folder(tmp_path / "rounded", config_of(raw), arrays))) > 0


# --- packed matrices --------------------------------------------------------------------------------------------------

EVERY_MODE = [
    (group_size, bits, mode)
    for mode, offered in MODES.items()
    for bits in offered["bits"]
    for group_size in offered["group_size"]
    if group_size != 128 or bits == 4
]


USUAL = {32: (2, 5, 8), 64: (3, 4, 6), 128: (4,)}  # group size -> bits: each of both


@pytest.mark.core(3)
@pytest.mark.parametrize(
    "form",
    [form if form[2] != "affine" or form[1] in USUAL[form[0]] else pytest.param(form, marks=pytest.mark.full)
     for form in EVERY_MODE],
    ids=lambda form: f"{form[2]}-{form[1]}-{form[0]}",
)  # fmt: skip
def test_a_packed_model_equals_the_unpacked_one(form, raw, tmp_path):
    packing = uniform(*form)
    target = as_converted(raw, tmp_path / "packed", mlx_lm_name, packing)
    assert open_checkpoint(target).quantization("model.language_model.layers.0.mlp.up_proj.weight") == Quantization(
        *form
    )
    assert difference(logits(target), logits(dequantized(raw, tmp_path / "unpacked", packing))) < TOLERANCE


def mixed(name: str) -> Quantization | None:
    """Another packing for each kind of matrix, and some that are not packed."""
    for part, packing in {
        "embed_tokens": Quantization(32, 6, "affine"),
        "layers.1.mlp.down_proj": Quantization(16, 4, "nvfp4"),
        "v_proj": Quantization(32, 8, "mxfp8"),
        "in_proj_qkv": Quantization(64, 3, "affine"),
        "in_proj_a": None,
        "o_proj": None,
    }.items():
        if part in name:
            return packing
    return Quantization(64, 4, "affine")


@pytest.mark.core(2)
@pytest.mark.parametrize("rename", [mlx_lm_name, mlx_vlm_name, str], ids=["mlx-lm", "mlx-vlm", "hugging face"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_of_mixed_packings_equals_the_unpacked_one(tied, rename, checkpoint_folder, tmp_path):
    folder = checkpoint_folder(changed(SMALL, tie_word_embeddings=tied), 3, mtp=False, vision=False)
    target = as_converted(folder, tmp_path / "packed", rename, mixed)
    checkpoint = open_checkpoint(target)
    assert checkpoint.quantization("model.language_model.layers.0.linear_attn.in_proj_qkv.weight").bits == 3
    assert checkpoint.quantization("model.language_model.layers.0.linear_attn.in_proj_a.weight") is None
    assert difference(logits(target), logits(dequantized(folder, tmp_path / "unpacked", mixed))) < TOLERANCE


@pytest.mark.parametrize("gpu", [METAL, CUDA], ids=lambda gpu: gpu.name)
def test_matrices_that_read_the_same_input_are_one_on_a_gpu_where_they_are_packed_alike(
    checkpoint_folder, tmp_path, gpu
):
    folder = checkpoint_folder(SMALL, 3, mtp=False, vision=False)
    with assume(replace(gpu, kernel_language="", usable_memory=CPU.usable_memory)):
        alike = load_text_model(as_converted(folder, tmp_path / "alike", mlx_lm_name, uniform(64, 4)))
        unlike = load_text_model(as_converted(folder, tmp_path / "unlike", mlx_lm_name, mixed))
    joined = [[layer.linear_attn.in_proj for layer in (model.layers[0],)] for model in (alike, unlike)]
    assert [len(part.products) for (part,) in joined] == [1, 3]  # qkv in 3 bits, a unpacked, z and b
    assert [len(model.layers[1].self_attn.qkv_proj.products) for model in (alike, unlike)] == [1, 2]
    x = mx.array(np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32))
    stored = tensors(tmp_path / "alike")
    name = "language_model.model.layers.0.mlp.up_proj."
    weight, *others = (stored[name + part] for part in ("weight", "scales", "biases"))
    alone = mx.dequantize(weight, *(part.astype(mx.float32) for part in others), group_size=64, bits=4)
    assert difference(alike.layers[0].mlp.gate_up(x)[1], x @ alone.T) < SAME


def test_a_packing_that_mlx_does_not_offer_is_refused(raw, tmp_path):
    folder = as_converted(raw, tmp_path / "packed", mlx_lm_name, uniform(64, 4))
    for field, value in (("bits", 7), ("group_size", 48), ("mode", "gptq")):
        config = config_of(folder)
        config["quantization"][field] = value
        (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
        with refused("quantization_invalid", field, value):
            open_checkpoint(folder)
        config["quantization"][field] = {"bits": 4, "group_size": 64, "mode": "affine"}[field]
        (tmp_path / "packed" / "config.json").write_text(json.dumps(config))


def test_other_bits_than_the_tensors_have_are_refused(raw, tmp_path):
    folder = as_converted(raw, tmp_path / "packed", mlx_lm_name, uniform(64, 4))
    config = config_of(folder)
    config["quantization"]["bits"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with refused("tensors_mismatch", "embed_tokens.weight", "1024", "32", "64"):
        open_checkpoint(folder)


# --- what the programs themselves write -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    """A checkpoint with tokenizer and preprocessors, which the other programs want: those of nano."""
    folder = tmp_path_factory.mktemp("peer") / "model"
    config = changed(geometry("tiny"), tie_word_embeddings=False)
    cases.write_random_checkpoint(folder, config, seed=4)
    for file in resolve("nano").iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            shutil.copy(file, folder)
    return folder


PEER_FORMS = [
    {},
    {"quantize": True, "q_bits": 4, "q_group_size": 64},
    {"quantize": True, "q_bits": 8, "q_group_size": 32},
    {"quantize": True, "q_bits": 4, "q_group_size": 32, "q_mode": "mxfp4"},
]
peer_form = pytest.mark.parametrize("form", PEER_FORMS, ids=["bfloat16", "4 bit", "8 bit", "mxfp4"])


@pytest.mark.core(2)
@peer_form
@pytest.mark.filterwarnings("ignore")
def test_a_folder_written_by_mlx_lm_gives_the_logits_of_mlx_lm(form, with_tokenizer, tmp_path):
    mlx_lm = pytest.importorskip("mlx_lm")
    target = tmp_path / "mlx-lm"
    mlx_lm.convert(str(with_tokenizer), str(target), **form)
    peer, _ = mlx_lm.load(str(target))
    peer.set_dtype(mx.float32)
    assert not open_checkpoint(target).raw
    assert difference(logits(target), peer(prompt())) < TOLERANCE


@peer_form
@pytest.mark.filterwarnings("ignore")
def test_a_folder_written_by_mlx_vlm_gives_the_logits_of_mlx_vlm(form, with_tokenizer, tmp_path):
    pytest.importorskip("mlx_vlm")
    from mlx_vlm.convert import convert
    from mlx_vlm.utils import load_model

    target = tmp_path / "mlx-vlm"
    convert(str(with_tokenizer), str(target), **form)
    peer = load_model(target)
    peer.set_dtype(mx.float32)
    assert open_checkpoint(target).has("model.visual.")
    assert difference(seen(target), peer.vision_tower(patches_of_a_picture()[0], mx.array([[1, 6, 4]]))[0]) < TOLERANCE
    media = load(target)[1].read("image", np.zeros((60, 70, 3), np.uint8), VisionOptions())
    assert media.grid == (1, 4, 4)  # by its preprocessor files
    embeddings = peer.language_model.model.embed_tokens(prompt()).astype(mx.float32)  # bfloat16 in mode mxfp4
    assert difference(logits(target), peer.language_model(prompt(), inputs_embeds=embeddings).logits) < TOLERANCE


def test_a_folder_saved_by_the_text_only_class_of_transformers(parity_folder, parity_model, tmp_path):
    pytest.importorskip("torch")
    from parity.reference import load_text_model as load_reference

    for case in (cases.by_name("tiny-0"), cases.by_name("untied")):
        target = tmp_path / case.name
        load_reference(case, parity_folder(case)).save_pretrained(target)
        assert config_of(target)["model_type"] == "qwen3_5_text"
        tokens = mx.array(cases.tokens(case, 40))[None]
        assert difference(load_text_model(target)(tokens), parity_model(case)(tokens)) < SAME


@pytest.mark.filterwarnings("ignore")
def test_our_random_checkpoints_load_in_transformers_without_missing_tensors(raw, raw_logits):
    torch = pytest.importorskip("torch")
    from transformers import Qwen3_5ForConditionalGeneration

    model, info = Qwen3_5ForConditionalGeneration.from_pretrained(raw, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in info["unexpected_keys"])
    with torch.no_grad():
        theirs = model(torch.tensor(prompt().tolist())).logits
    assert difference(raw_logits, mx.array(theirs.numpy())) < TOLERANCE
