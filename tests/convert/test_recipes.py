"""Recipes: what they store how, how large that makes the 4B, and what the options refuse."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest
from refusing import refused

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.names import MTP, VISION
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import is_matrix, mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.files import peer_module
from mlx_qwen35.convert.recipes import RECIPES

CONFIG = parse_config(geometry("4b"))
TEXT_4B, MTP_4B, VISION_4B = text_shapes(CONFIG.text), mtp_shapes(CONFIG.text), vision_shapes(CONFIG.vision)


def nbytes(recipe: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """Bytes of these tensors: packed ones by their parts, the rest in 16 bit, A_log in 32."""
    total = 0
    for name, shape in shapes.items():
        how = RECIPES[recipe].quantization(name, shape)
        if how is None:
            total += math.prod(shape) * (4 if name.endswith("A_log") else 2)
            continue
        for suffix, part in how.parts(shape).items():
            size = 4 if suffix == "weight" else 2 if how.mode == "affine" else 1
            total += math.prod(part) * size
    return total


@pytest.mark.parametrize(("recipe", "most"), [("4bit", 3.0e9), ("8bit", 5.0e9)])
def test_a_recipe_keeps_the_4b_within_its_bytes(recipe, most):
    assert nbytes(recipe, TEXT_4B | MTP_4B | VISION_4B) <= most


def test_the_text_model_of_4bit_takes_at_most_2_55_gigabytes():
    assert nbytes("4bit", TEXT_4B) <= 2.55e9


def test_4bit_is_mixed():
    recipe = RECIPES["4bit"]
    bits = {name: recipe.quantization(name, shape) for name, shape in (TEXT_4B | MTP_4B | VISION_4B).items()}
    for name, how in bits.items():
        if name.endswith(("in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "norm.weight", "A_log", "dt_bias")):
            assert how is None, name
        elif name.endswith(("out_proj.weight", "o_proj.weight")) and not name.startswith(MTP):
            assert how.bits == 8, name
        elif is_matrix(name, TEXT_4B.get(name) or MTP_4B.get(name) or VISION_4B[name]):
            assert how.bits == (8 if name.startswith(VISION) else 4), name


def test_bits_of_the_bulk_order_the_recipes_by_size():
    sizes = [nbytes(name, TEXT_4B) for name in ("mxfp4", "4bit", "5bit", "6bit", "8bit", "bf16")]
    assert sizes == sorted(sizes)


def test_every_recipe_says_what_it_is_for_and_why():
    assert all(recipe.use and recipe.reasons for recipe in RECIPES.values())


@pytest.mark.core(3)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_what_the_folder_holds(recipe, checkpoint_folder, tmp_path):
    folder = convert(checkpoint_folder(), tmp_path / "out", recipe=recipe)
    checkpoint = open_checkpoint(folder)
    for name, shape in text_shapes(checkpoint.config.text).items():
        assert checkpoint.quantization(name) == RECIPES[recipe].quantization(name, shape), name
    stored = {entry.dtype for name, entry in checkpoint.entries.items() if name.endswith("layernorm.weight")}
    assert stored == {"F16" if recipe == "fp16" else "BF16"}


def test_config_names_what_differs_from_the_bulk_as_peers_read_it(checkpoint_folder, tmp_path):
    folder = convert(checkpoint_folder(), tmp_path / "out", recipe="4bit")
    entry = json.loads((folder / "config.json").read_text())["quantization"]
    assert (entry["bits"], entry["group_size"], entry["mode"]) == (4, 64, "affine")
    text = {name: how["bits"] for name, how in entry.items() if name.startswith("language_model.")}
    assert text == {
        **{f"language_model.model.layers.{i}.linear_attn.out_proj": 8 for i in range(3)},
        "language_model.model.layers.3.self_attn.o_proj": 8,
    }


def test_modules_have_the_names_of_peers():
    assert peer_module("model.language_model.norm.weight") == "language_model.model.norm"
    assert peer_module("lm_head.weight") == "language_model.lm_head"
    assert peer_module("mtp.layers.0.mlp.up_proj.weight") == "language_model.mtp.layers.0.mlp.up_proj"
    assert peer_module("model.visual.blocks.0.attn.qkv.weight") == "vision_tower.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"recipe": "3bit"}, "recipe_not_found"),
        ({"recipe": "4bit", "quantize": True, "q_bits": 8},
         "option_conflict"),
        ({"recipe": "bf16", "q_vision_bits": 4}, "option_no_effect"),
        ({"recipe": "fp16", "dtype": "bfloat16"}, "option_conflict"),
        ({"recipe": "4bit", "q_vision_bits": 7}, "option_invalid"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(options, code, checkpoint_folder, tmp_path):
    with refused(code):
        convert(checkpoint_folder(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_recipe_takes_another_dtype_and_other_bits_for_the_tower(checkpoint_folder, tmp_path):
    folder = convert(checkpoint_folder(), tmp_path / "out", recipe="4bit", dtype="float16", q_vision_bits=0)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.entries["model.language_model.embed_tokens.scales"].dtype == "F16"
    assert not any(checkpoint.quantization(name) for name in vision_shapes(checkpoint.config.vision))


def test_the_model_of_a_mixed_recipe_computes(checkpoint_folder, tmp_path, text_model):
    from conftest import load_text_model

    model = load_text_model(Path(convert(checkpoint_folder(), tmp_path / "out", recipe="8bit")))
    tokens = mx.array([[1, 2, 3, 4]])
    error = mx.abs(model(tokens) - text_model()(tokens)).max().item()
    assert error < 0.1 * mx.abs(text_model()(tokens)).max().item()
