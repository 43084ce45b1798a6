"""float16 in the place of bfloat16: what it cannot hold is named and stays in float32; nothing is in memory twice."""

import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_text_model
from geometries import changed
from refusing import refused

from mlx_qwen35.checkpoint import float16
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.float16 import LARGEST, SMALLEST, tell, unfit
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.load import load_model, load_vision_encoder

SMALL = changed(geometry("tiny"), num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
LAYER = "model.language_model.layers.1."
UP, GAMMA = f"{LAYER}mlp.up_proj.", f"{LAYER}post_attention_layernorm.weight"
Tensors = dict[str, mx.array]


@pytest.fixture
def checkpoint_with(checkpoint_copy) -> Callable[..., Path]:
    """(a function that changes the tensors, stored dtype = bfloat16, bits = None) -> the folder."""

    def folder(plant: Callable[[Tensors], None], dtype: mx.Dtype = mx.bfloat16, bits: int | None = None) -> Path:
        target = checkpoint_copy(SMALL, dtype=dtype, mtp=False)
        (file,) = target.glob("*.safetensors")
        tensors = dict(mx.load(str(file)))
        plant(tensors)
        if bits:
            _pack(tensors, target, bits)
        mx.eval(tensors)
        mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})
        if bits:
            (target / "model.safetensors.index.json").unlink()
            file.rename(target / "model.safetensors")
        return target

    return folder


def _pack(tensors: Tensors, folder: Path, bits: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": bits, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in [name for name, a in tensors.items() if ".language_model." in name and is_matrix(name, a.shape)]:
        parts = mx.quantize(tensors.pop(name), group_size=64, bits=bits)
        named = zip(("weight", "scales", "biases"), parts, strict=True)
        tensors |= {name.removesuffix("weight") + part: array for part, array in named}


def outlier(tensors: Tensors, value: float = 1e5) -> None:
    """Weights that float16 cannot hold, of an input that the norm before makes as small: the products are some 100."""
    j, gamma, weight = 7, tensors[GAMMA], tensors[f"{UP}weight"]
    tensors[GAMMA] = mx.where(mx.arange(gamma.size) == j, -1 + 2.0**-8 * 1e5 / value, gamma).astype(mx.float32)
    rows = mx.arange(weight.shape[0])[:, None] < 3
    planted = mx.where(rows & (mx.arange(weight.shape[1]) == j), value, weight.astype(mx.float32))
    tensors[f"{UP}weight"] = planted.astype(weight.dtype)


def vanishing(tensors: Tensors, name: str = f"{UP}weight", rows: int = 5) -> None:
    weight = tensors[name]
    small = mx.arange(weight.shape[0]).reshape(-1, *[1] * (weight.ndim - 1)) < rows
    tensors[name] = mx.where(small, 1e-6, weight).astype(weight.dtype)


def nothing(tensors: Tensors) -> None:
    pass


def prompt(count: int = 40) -> mx.array:
    return mx.array(np.random.default_rng(6).integers(0, 900, (1, count)).astype(np.int32))


def logits(model) -> mx.array:
    """Of a prompt at once and of some tokens alone, which take other ways through packed matrices."""
    cache = model.make_cache()
    parts = [model(prompt()[:, :37], cache), *(model(prompt()[:, t : t + 1], cache) for t in range(37, 40))]
    return mx.concatenate(parts, axis=1)


# --- which arrays do not fit -----------------------------------------------------------------------------------------


def whether(array: mx.array) -> str | None:
    return unfit([("it", array)]).get("it")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_matrix_that_is_not_finite_is_damaged(value):
    array = mx.ones((3, 64))
    array[1, 7] = value
    with refused("weights_not_finite"):
        unfit([("w", array)])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("value", [1e5, -1e5, 3e38])
def test_a_value_beyond_the_range_is_found_wherever_it_stands(dtype, value):
    for row, column in ((0, 0), (3, 5), (6, 8)):
        array = np.ones((7, 9), np.float32)
        array[row, column] = value
        assert whether(mx.array(array).astype(dtype)).startswith("holds ")


def test_the_largest_number_of_float16_fits_and_the_next_does_not():
    assert whether(mx.array([[LARGEST, -LARGEST]])) is None
    assert whether(mx.array([[1.0, -65536.0]])) == "holds 6.55e+04"
    assert np.isfinite(np.float16(LARGEST)) and np.finfo(np.float16).max == LARGEST


def test_rows_whose_largest_number_is_too_small_are_counted():
    array = np.full((6, 8), 0.01, np.float32)
    array[1], array[4] = 1e-6, -1e-6
    array[2, 1:] = 1e-7  # beside a larger one they lose nothing that counts
    assert whether(mx.array(array)) == "2 of 6 rows are below 1.5e-05"


def test_rows_of_zeros_are_held_exactly():
    assert whether(mx.array([[0.0, 0.0], [1.0, 2.0]])) is None and whether(mx.zeros((4, 4))) is None


def test_a_vector_is_one_row_and_a_convolution_has_rows_along_its_last_axis():
    assert whether(mx.array([1.0, 1e-6])) is None
    assert whether(mx.full((5,), 1e-6)) == "1 of 1 rows are below 1.5e-05"
    assert whether(mx.full((2, 3, 4), 1e-6)) == "6 of 6 rows are below 1.5e-05"


def test_above_the_limit_float16_rounds_no_worse_than_bfloat16_and_far_below_worse():
    def error(values: mx.array, dtype: mx.Dtype) -> float:
        return mx.abs(values.astype(dtype).astype(mx.float32) / values - 1).max().item()

    above = mx.array(np.geomspace(SMALLEST, 2.0**-14, 5000).astype(np.float32))
    below = above * 2.0**-4
    assert error(above, mx.float16) <= error(above, mx.bfloat16) < error(below, mx.float16)


def test_of_many_tensors_eight_are_named_and_the_rest_are_counted():
    with pytest.warns(RuntimeWarning, match=r"11 tensors kept in float32.*t7 \(why\); and 3 more\. .*dtype='bfloat16'"):
        tell({f"t{i}": "why" for i in range(11)})
    with pytest.warns(RuntimeWarning, match=r"hold them: t0 \(why\)\. With"):
        tell({"t0": "why"})


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.core(3)
@pytest.mark.parametrize(
    ("plant", "dtype", "bits", "named"),
    [
        (outlier, mx.bfloat16, None, r"mlp.up_proj.weight \(holds 9.98e\+04\)\. "),
        (outlier, mx.float32, None, r"mlp.up_proj.weight \(holds 1e\+05\)\. "),
        (vanishing, mx.bfloat16, None, r"mlp.up_proj.weight \(5 of 448 rows are below 1.5e-05\)\. "),
        (vanishing, mx.float32, None, r"mlp.up_proj.weight \(5 of 448 rows are below 1.5e-05\)\. "),
        (functools.partial(outlier, value=2e6), mx.float32, 4, r"up_proj.scales \(holds 1.\d+e\+05\)"),
        (vanishing, mx.bfloat16, 4, r"up_proj.scales \(5 of 448 rows are below 1.5e-05\)"),
    ],
    ids=["too large", "too large, float32", "too small", "too small, float32", "scales too large", "scales too small"],
)
def test_what_float16_cannot_hold_is_named_and_stays_in_float32(checkpoint_with, plant, dtype, bits, named):
    folder = checkpoint_with(plant, dtype, bits)
    with pytest.warns(RuntimeWarning, match=rf"[12] tensors? kept in float32.*model.language_model.layers.1.*{named}"):
        model = load_text_model(folder, mx.float16)
    (gate, up), down = model.layers[1].mlp.gate_up.products, model.layers[1].mlp.down_proj
    form = "scales" if bits else "weight"
    assert [getattr(linear, form).dtype for linear in (gate, up, down)] == [mx.float16, mx.float32, mx.float16]
    want = logits(load_text_model(folder))
    ours = logits(model)
    assert ours.dtype == mx.float16
    error = mx.abs(ours.astype(mx.float32) - want)
    assert error.square().mean().sqrt().item() < 5e-3


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32, mx.float16], ids=str)
def test_of_an_ordinary_checkpoint_nothing_is_named_or_kept_apart(checkpoint_with, dtype, bits):
    folder = checkpoint_with(nothing, dtype, bits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_text_model(folder, mx.float16)
        tower = load_vision_encoder(open_checkpoint(folder), mx.float16)
    for layer in model.layers:
        for product in layer.mlp.gate_up.products:
            assert (product.scales if bits else product.weight).dtype == mx.float16
    assert tower.blocks[0].norm1.weight.dtype == tower.patch_embed.weight.dtype == mx.float16


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_other_dtypes_hold_everything(checkpoint_with, dtype):
    model = load_text_model(checkpoint_with(outlier), dtype)
    assert all(product.weight.dtype == dtype for product in model.layers[1].mlp.gate_up.products)


def test_what_is_stored_in_float16_is_not_looked_at(checkpoint_with, monkeypatch):
    monkeypatch.setattr(float16, "unfit", lambda arrays: pytest.fail("read for nothing") if list(arrays) else {})
    tiny_rows = functools.partial(vanishing, name=f"{LAYER}mlp.gate_proj.weight")
    load_text_model(checkpoint_with(tiny_rows, mx.float16), mx.float16)


def test_a_tied_embedding_in_float32_gives_activations_and_logits_in_float16(checkpoint_with):
    folder = checkpoint_with(functools.partial(vanishing, name="model.language_model.embed_tokens.weight"))
    with pytest.warns(RuntimeWarning, match="1 tensor kept in float32.*embed_tokens.weight"):
        model = load_text_model(folder, mx.float16)
    assert model.embed_tokens.weight.dtype == mx.float32
    assert model.embed(prompt()).dtype == model(prompt()).dtype == mx.float16


def test_norms_and_gates_are_in_float32_anyway_and_are_not_told_of(checkpoint_with):
    def plant(tensors: Tensors) -> None:
        mixer = "model.language_model.layers.0.linear_attn."
        names = [f"{mixer}{name}" for name in ("dt_bias", "norm.weight", "conv1d.weight")]
        for name in [*names, f"{LAYER}self_attn.q_norm.weight"]:
            tensors[name] = (1e-6 * mx.ones(tensors[name].shape)).astype(tensors[name].dtype)

    load_text_model(checkpoint_with(plant), mx.float16)  # a warning would be an error


def test_of_the_tower_too_what_does_not_fit_is_named_and_its_embeddings_are_in_float16(checkpoint_with):
    tower = "model.visual."
    names = [f"{tower}{name}" for name in ("blocks.0.mlp.linear_fc1.weight", "blocks.1.norm1.bias", "merger.norm.bias")]

    def plant(tensors: Tensors) -> None:
        vanishing(tensors, names[0])
        for name in names[1:]:
            tensors[name] = mx.full(tensors[name].shape, 1e-6, tensors[name].dtype)
        table = f"{tower}pos_embed.weight"  # in float32 anyway
        tensors[table] = mx.zeros_like(tensors[table]) + 1e-6

    checkpoint = open_checkpoint(checkpoint_with(plant))
    load_model(checkpoint, mx.float16, "it")  # the tower's tensors are looked at when it is needed
    with pytest.warns(RuntimeWarning, match="3 tensors kept in float32") as told:
        narrow = load_vision_encoder(checkpoint, mx.float16)
    assert all(f"{name} (" in str(told[0].message) for name in names)
    kept = (narrow.blocks[0].mlp.linear_fc1.weight, narrow.blocks[1].norm1.bias, narrow.merger.norm.bias)
    assert [array.dtype for array in kept] == [mx.float32] * 3
    patches = mx.array(np.random.default_rng(7).uniform(-1, 1, (1, 24, 1536)).astype(np.float32))
    ours, want = narrow([patches], (6, 4)), load_vision_encoder(checkpoint, mx.float32)([patches], (6, 4))
    assert ours.dtype == mx.float16
    assert mx.abs(ours.astype(mx.float32) - want).max().item() < 2e-2 * mx.abs(want).max().item()


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_casting_at_load_takes_no_more_than_the_weights_and_the_largest_part_of_them(checkpoint_folder):
    """Each layer is read, cast and let go; the embedding is the largest part."""
    checkpoint = open_checkpoint(checkpoint_folder(geometry("mid"), mtp=False, vision=False))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = load_model(checkpoint, mx.float16, "mid")
    final, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    nbytes = {name: 2 * math.prod(shape) for name, shape in text_shapes(model.config).items()}
    parts = [sum(n for name, n in nbytes.items() if part in name) for part in ("embed_tokens", ".0.", ".3.")]
    assert 1.0 <= final / sum(nbytes.values()) < 1.02
    assert peak < final + max(parts) + 4e6
