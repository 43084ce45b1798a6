"""The vision tower in a quantized folder: which tensors are packed, how, and what stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from converting import nearest

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.fields import read_json
from mlx_qwen35.quantization import Quantization

VISUAL = "model.visual."
LINEAR = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
MATRICES = [f"blocks.{i}.{name}" for i in (0, 1) for name in LINEAR] + ["merger.linear_fc1", "merger.linear_fc2"]


def tower(folder: Path) -> dict[str, mx.array]:
    """The tower's tensors by their names without model.visual."""
    arrays = {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
    return {name.removeprefix(VISUAL): array for name, array in arrays.items() if name.startswith(VISUAL)}


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.all(a == b))


def overrides(folder: Path) -> dict[str, Any]:
    """The entries of config.json that tell how single modules are packed."""
    config = read_json(folder / "config.json")
    assert config["quantization"] == config["quantization_config"]
    return {name: value for name, value in config["quantization"].items() if isinstance(value, dict)}


@pytest.fixture
def packed_with(tmp_path) -> Callable[..., Path]:
    """Fields of vision_config -> the quantized folder of a random checkpoint that has them."""

    def folder(**fields: Any) -> Path:
        config = geometry("tiny")
        config["vision_config"] |= fields
        source = write_random_checkpoint(tmp_path / "raw", config, mtp=False)
        return convert(source, tmp_path / "out", quantize=True)

    return folder


def test_matrices_are_packed_and_all_else_is_the_sources(raw, tmp_path):
    before, after = tower(raw), tower(convert(raw, tmp_path / "out", quantize=True))
    packed = {f"{name}.{part}" for name in MATRICES for part in ("weight", "scales", "biases")}
    left = set(before) - {f"{name}.weight" for name in MATRICES}
    assert {"patch_embed.proj.weight", "pos_embed.weight", "merger.norm.weight", "blocks.0.attn.qkv.bias"} <= left
    assert set(after) == packed | left
    assert [name for name in left if not same(before[name], after[name])] == []


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 8),
        ({"q_bits": 3, "dtype": "float16"}, 8),
        ({"q_mode": "nvfp4", "dtype": "float32"}, 8),
        ({"q_group_size": 32, "q_vision_bits": 4}, 4),
        ({"q_mode": "mxfp8", "q_vision_bits": 5}, 5),
    ],
)
def test_packed_matrices_are_those_of_mx_quantize(raw, tmp_path, options, bits):
    before, after = tower(raw), tower(nearest(raw, tmp_path / "out", quantize=True, **options))
    for name in MATRICES:
        weight = before[f"{name}.weight"].astype(getattr(mx, options.get("dtype", "bfloat16")))
        parts = mx.quantize(weight, group_size=64, bits=bits, stream=mx.cpu)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
            assert same(after[f"{name}.{suffix}"], part), (name, suffix)


@pytest.mark.parametrize("options", [{}, {"q_vision_bits": 4}, {"q_mode": "mxfp4", "q_vision_bits": 2}])
def test_config_tells_how_each_matrix_is_packed(raw, tmp_path, options):
    out = convert(raw, tmp_path / "out", quantize=True, **options)
    form = {"group_size": 64, "bits": options.get("q_vision_bits", 8), "mode": "affine"}
    assert overrides(out) == {f"vision_tower.{name}": form for name in MATRICES}
    checkpoint = open_checkpoint(out)
    assert {checkpoint.quantization(f"{VISUAL}{name}.weight") for name in MATRICES} == {Quantization(**form)}


def test_zero_bits_leave_the_tower_as_it_is(raw, tmp_path):
    out = convert(raw, tmp_path / "out", quantize=True, q_vision_bits=0)
    before, after = tower(raw), tower(out)
    assert set(after) == set(before) and all(same(before[name], after[name]) for name in before)
    assert overrides(out) == {}
    assert open_checkpoint(out).quantization("model.language_model.embed_tokens.weight")


# Hidden size and intermediate size are the widths; the merger's are four times the hidden size.
@pytest.mark.parametrize(
    ("hidden", "inner", "groups"),
    [
        (96, 192, {"attn.qkv": 32, "attn.proj": 32, "mlp.linear_fc1": 32, "mlp.linear_fc2": 64, "merger": 64}),
        (192, 4304, {"attn.qkv": 64, "attn.proj": 64, "mlp.linear_fc1": 64, "merger": 64}),
        (36, 80, {}),
        pytest.param(
            192, 208, {"attn.qkv": 64, "attn.proj": 64, "mlp.linear_fc1": 64, "merger": 64}, marks=pytest.mark.full
        ),
        pytest.param(72, 160, {"mlp.linear_fc2": 32, "merger": 32}, marks=pytest.mark.full),
    ],
)
def test_group_size_is_64_or_32_where_it_divides_the_width(packed_with, hidden, inner, groups):
    out = packed_with(hidden_size=hidden, intermediate_size=inner, num_heads=3)
    expected = {
        f"vision_tower.{name}": {"group_size": size, "bits": 8, "mode": "affine"}
        for kind, size in groups.items()
        for name in MATRICES
        if kind in name
    }
    assert overrides(out) == expected
    held = {name.removesuffix(".scales") for name in tower(out) if name.endswith(".scales")}
    assert {f"vision_tower.{name}" for name in held} == set(expected)


def test_matrix_that_no_group_size_divides_is_the_sources(packed_with, tmp_path):
    after = tower(packed_with(intermediate_size=208))
    before = tower(tmp_path / "raw")
    assert same(after["blocks.1.mlp.linear_fc2.weight"], before["blocks.1.mlp.linear_fc2.weight"])


def test_config_names_modules_alike_whatever_the_source_calls_them(raw, tmp_path):
    arrays = {name: array for file in raw.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
    source = tmp_path / "raw"
    source.mkdir()
    mx.save_safetensors(str(source / "model.safetensors"), {n.replace(VISUAL, "visual."): a for n, a in arrays.items()})
    (source / "config.json").write_bytes((raw / "config.json").read_bytes())
    assert not (source / INDEX).exists()
    out = convert(source, tmp_path / "out", quantize=True)
    assert set(overrides(out)) == {f"vision_tower.{name}" for name in MATRICES}
    assert open_checkpoint(out).quantization(f"{VISUAL}merger.linear_fc1.weight") == Quantization(64, 8, "affine")
