"""A converted folder in the programs that load it: ours, transformers, mlx-lm, mlx-vlm."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from converting import nearest, unpacked
from geometries import changed
from mlx.utils import tree_flatten

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.fields import read_json
from mlx_qwen35.load import load_model
from mlx_qwen35.model.layers import RMSNorm
from mlx_qwen35.model.weights import Weights

IDS = np.random.default_rng(7).integers(0, 980, (1, 6))  # few: on the CPU MLX multiplies half types slowly
ORDINARY = [("float32", None), ("bfloat16", 8), ("float16", 4)]
SAME_DTYPE = [
    pytest.param(dtype, bits, marks=() if (dtype, bits) in ORDINARY else pytest.mark.full)
    for dtype in ("float32", "bfloat16", "float16")
    for bits in (None, 4, 8)
]
# float32 sums of another order: 1e-6 to 2e-5 at logits of standard deviation 0.3 (tests/parity)
TOLERANCE = 1e-4


def options(dtype: str, bits: int | None) -> dict:
    return {"dtype": dtype, "quantize": bits is not None, "q_bits": bits}


def by_us(folder: Path, dtype: mx.Dtype = mx.float32) -> mx.array:
    return load_model(open_checkpoint(folder), dtype, str(folder))(mx.array(IDS)).astype(mx.float32)


@pytest.fixture(scope="module")
def mlx_lm():
    """(convert, load_model) of mlx-lm."""
    pytest.importorskip("mlx_lm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm.convert import convert as theirs
        from mlx_lm.utils import load_model as load
    return theirs, lambda folder: load(folder)[0]


@pytest.fixture(scope="module")
def mlx_vlm():
    """load_model of mlx-vlm."""
    pytest.importorskip("mlx_vlm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_vlm.utils import load_model as load
    return load


@pytest.fixture
def both(mlx_lm, source_of, tmp_path):
    """(source dtype, output dtype, bits) -> mlx-lm's models of our folder and of the one that it converts itself."""

    def models(source: str, dtype: str, bits: int | None):
        theirs, load = mlx_lm
        ours = nearest(source_of(source), tmp_path / "ours", **options(dtype, bits))
        theirs(str(source_of(source)), str(tmp_path / "theirs"), **options(dtype, bits))
        return load(ours), load(tmp_path / "theirs")

    return models


def largest(difference: mx.array) -> float:
    return mx.max(mx.abs(difference.astype(mx.float32))).item()


def stored_in(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}


@pytest.mark.core(1)
@pytest.mark.parametrize(("dtype", "bits"), SAME_DTYPE)
def test_mlx_lm_computes_with_our_folder_what_it_computes_with_its_own(both, dtype, bits):
    ours, theirs = both(dtype, dtype, bits)
    parameters = dict(tree_flatten(theirs.parameters()))
    for name, array in tree_flatten(ours.parameters()):
        assert array.dtype == parameters[name].dtype and mx.array_equal(array, parameters[name]), name
    logits = ours(mx.array(IDS))
    assert 0.1 < mx.std(logits.astype(mx.float32)).item() < 1
    assert mx.array_equal(logits, theirs(mx.array(IDS)))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.full), "float16"])
@pytest.mark.parametrize("bits", [pytest.param(None, marks=pytest.mark.full), 4])
def test_mlx_lm_differs_only_by_its_own_rounding_of_norms(both, dtype, bits):
    """From a bfloat16 source mlx-lm forms 1 + w in bfloat16 when it converts; from our folder in the output's dtype."""
    ours, theirs = both("bfloat16", dtype, bits)
    parameters = dict(tree_flatten(theirs.parameters()))
    own = dict(tree_flatten(ours.parameters()))
    rounded = [name for name in own if not mx.array_equal(own[name], parameters[name])]
    assert rounded and all(name.endswith("norm.weight") for name in rounded)
    for name in rounded:
        assert largest(own[name] - parameters[name]) < 2**-8 + 2**-10, name  # half a step of bfloat16 in [1, 2)
        own[name] = parameters[name]
    ours.load_weights(list(own.items()))
    assert mx.array_equal(ours(mx.array(IDS)), theirs(mx.array(IDS)))


@pytest.mark.full
def test_default_options_rounded_to_nearest_are_mlx_lms(mlx_lm, raw, tmp_path):
    theirs, load = mlx_lm
    nearest(raw, tmp_path / "ours", quantize=True)
    theirs(str(raw), str(tmp_path / "theirs"), quantize=True)
    ours, theirs = (load(tmp_path / name)(mx.array(IDS)) for name in ("ours", "theirs"))
    assert ours.dtype == theirs.dtype == mx.bfloat16 and mx.array_equal(ours, theirs)


@pytest.mark.core(1)
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_other_modes_load_in_mlx_lm(mlx_lm, source_of, tmp_path, mode):
    theirs, load = mlx_lm
    nearest(source_of("float32"), tmp_path / "ours", quantize=True, q_mode=mode)
    theirs(str(source_of("float32")), str(tmp_path / "theirs"), quantize=True, q_mode=mode)
    assert mx.array_equal(*(load(tmp_path / name)(mx.array(IDS)) for name in ("ours", "theirs")))


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_mlx_vlm_loads_text_and_vision(mlx_lm, mlx_vlm, source_of, tmp_path, bits):
    folder = convert(source_of("float32"), tmp_path / "out", **options("float32", bits))
    model = mlx_vlm(folder)
    logits = model.language_model(mx.array(IDS)).logits
    assert largest(logits - mlx_lm[1](folder)(mx.array(IDS))) < TOLERANCE
    parameters = dict(tree_flatten(model.vision_tower.parameters()))
    stored = {name: a for name, a in stored_in(folder).items() if name.startswith("model.visual.")}
    assert {f"model.visual.{name}" for name in parameters} == set(stored)
    for name, array in stored.items():
        if not name.endswith("patch_embed.proj.weight"):  # mlx-vlm moves its axes
            assert mx.array_equal(parameters[name.removeprefix("model.visual.")], array), name


# --- the packed vision tower ------------------------------------------------------------------------------------------


def with_dequantized_tower(folder: Path, target: Path) -> Path:
    """The same checkpoint, in which what the tower's packed matrices stand for takes their place."""
    checkpoint, arrays = open_checkpoint(folder), stored_in(folder)
    for name in [name for name in arrays if name.startswith("model.visual.") and name.endswith(".scales")]:
        module = name.removesuffix("scales")
        how = checkpoint.quantization(f"{module}weight")
        parts = [arrays.pop(module + part) for part in ("weight", "scales", "biases")]
        arrays[f"{module}weight"] = mx.dequantize(*parts, group_size=how.group_size, bits=how.bits)
    config = read_json(folder / "config.json")
    for entry in ("quantization", "quantization_config"):
        config[entry] = {name: value for name, value in config[entry].items() if not name.startswith("vision_tower.")}
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), arrays, metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def about_a_picture(model, config: dict, seed: int = 0) -> mx.array:
    """Logits of mlx-vlm for six tokens after a picture of random pixels: (1, 12, vocabulary).

    The picture has 4 x 6 patches of 16 x 16 pixels in 2 equal frames, which become 2 x 3 image tokens.
    """
    vision = config["vision_config"]
    values = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    pixels = np.random.default_rng(seed).uniform(-1, 1, (24, values)).astype(np.float32)
    picture = [config["vision_start_token_id"], *[config["image_token_id"]] * 6, config["vision_end_token_id"]]
    tokens = mx.array([picture + IDS[0].tolist()])
    return model(tokens, mx.array(pixels), image_grid_thw=mx.array([[1, 4, 6]])).logits


def leaves(module: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)]


ODD_WIDTHS = {"hidden_size": 96, "intermediate_size": 208, "num_heads": 3}  # groups of 32, 64 and none


@pytest.mark.parametrize("widths", [{}, ODD_WIDTHS], ids=["widths of 64", "odd widths"])
@pytest.mark.parametrize("bits", [8, 4])
def test_mlx_vlm_computes_with_the_packed_tower_what_it_computes_with_its_values(mlx_vlm, tmp_path, bits, widths):
    config = changed(geometry("tiny"), dtype="float32")
    config["vision_config"] |= widths
    source = write_random_checkpoint(tmp_path / "raw", config, dtype=mx.float32, mtp=False)
    folder = convert(source, tmp_path / "out", quantize=True, q_vision_bits=bits)
    packed, unpacked = mlx_vlm(folder), mlx_vlm(with_dequantized_tower(folder, tmp_path / "unpacked"))
    layers = [layer for layer in leaves(packed.vision_tower) if isinstance(layer, nn.QuantizedLinear)]
    assert len(layers) == (8 if widths else 10) and {layer.bits for layer in layers} == {bits}
    assert {layer.group_size for layer in layers} == ({32, 64} if widths else {64})
    assert not any(isinstance(layer, nn.QuantizedLinear) for layer in leaves(unpacked.vision_tower))
    logits = about_a_picture(packed, config)
    assert largest(logits - about_a_picture(unpacked, config)) < TOLERANCE
    assert largest(logits - about_a_picture(packed, config, seed=1)) > 100 * TOLERANCE  # the picture matters
    plain = convert(source, tmp_path / "plain", quantize=True, q_vision_bits=0)
    assert largest(logits - about_a_picture(mlx_vlm(plain), config)) > TOLERANCE  # so do the packed bits


@pytest.mark.parametrize("vision_bits", [8, pytest.param(0, marks=pytest.mark.full)])
def test_mlx_lm_computes_the_same_with_and_without_the_tower(mlx_lm, source_of, tmp_path, vision_bits):
    config = changed(geometry("tiny"), dtype="float32")
    bare = write_random_checkpoint(tmp_path / "bare", config, dtype=mx.float32, vision=False)  # the same text: one seed
    convert(source_of("float32"), tmp_path / "with", quantize=True, q_vision_bits=vision_bits)
    convert(bare, tmp_path / "without", quantize=True)
    assert mx.array_equal(*(mlx_lm[1](tmp_path / name)(mx.array(IDS)) for name in ("with", "without")))


# --- ours and transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_loader_computes_the_sources_logits_exactly(raw, tmp_path, dtype):
    """bfloat16 too: what it cannot hold is kept exactly beside it."""
    assert mx.array_equal(by_us(unpacked(raw, tmp_path / "out", dtype=dtype)), by_us(raw))


@pytest.mark.parametrize("bits", [4, 8])
def test_our_loader_agrees_with_mlx_lm_on_quantized_folders(mlx_lm, source_of, tmp_path, bits):
    folder = convert(source_of("float32"), tmp_path / "out", **options("float32", bits))
    assert largest(by_us(folder) - mlx_lm[1](folder)(mx.array(IDS))) < TOLERANCE


@pytest.mark.parametrize(("recipe", "most"), [("4bit", 1e-4), ("mxfp4", 3e-4)])
def test_with_the_norms_folded_as_they_fold_them_our_logits_of_a_recipe_are_those_of_both(
    mlx_lm, mlx_vlm, source_of, tmp_path, monkeypatch, recipe, most
):
    """From a bfloat16 folder they form 1 + w in bfloat16; computed on in float32 here and there."""
    folder = convert(source_of("bfloat16"), tmp_path / "out", recipe=recipe)
    models = (mlx_lm[1](folder), mlx_vlm(folder).language_model)
    for model in models:
        model.set_dtype(mx.float32)
    theirs = models[0](mx.array(IDS)), models[1](mx.array(IDS)).logits
    exact = by_us(folder)

    def folded(weights: Weights, name: str) -> RMSNorm:
        return RMSNorm((1.0 + weights.float32(f"{name}.weight")).astype(mx.bfloat16).astype(mx.float32), weights.eps)

    monkeypatch.setattr(Weights, "norm", folded)
    rounded = replace(open_checkpoint(folder), exact={})  # nor do they see exact DeltaNet norms beside the rounded
    ours = load_model(rounded, mx.float32, "rounded")(mx.array(IDS))
    assert largest(ours - exact) > TOLERANCE  # the folding is what shows
    assert largest(ours - theirs[0]) < 1e-4 and largest(ours - theirs[1]) < most


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.full), "float16", "bfloat16"])
def test_transformers_loads_the_unquantized_folder(source_of, tmp_path, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = unpacked(source_of(dtype), tmp_path / "out")

    def logits(path: Path):
        model, info = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            return model(input_ids=torch.tensor(IDS)).logits.numpy()

    after = logits(folder)
    assert np.abs(after - np.array(by_us(folder))).max() < (TOLERANCE if dtype == "float32" else 0.01)
    if dtype == "float32":
        assert np.array_equal(after, logits(source_of(dtype)))
