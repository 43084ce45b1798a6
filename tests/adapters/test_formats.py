"""Adapters of PEFT, mlx-lm and mlx-vlm as they are read: fused, they give the logits of the programs that made them."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapters import golden_adapters as goldens
from adapters.editing import edited, shown_tensors
from adapters.fusing import fused_encoder, fused_model
from parity import vision_cases
from parity.cases import Case, Reference

from mlx_qwen35.checkpoint.adapter import Adapter, fused, read_adapter
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.names import HEAD, TABLE

# Of float32 logits with a standard deviation of 0.3 to 0.8, which the adapters move by 0.7 to 3: the worst is 8e-6. The
# embeddings of images are 40 times as large.
NEAR, NEAR_OF_TOWER = 2e-5, 8e-4
STALE = 2e-5  # between two machines' float32
UP = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(parity_folder: Callable[[Case], Path]) -> Path:
    return parity_folder(goldens.MODEL)


def there(*modules: str) -> bool:
    return all(sys.modules.get(m, True) is not None and importlib.util.find_spec(m) is not None for m in modules)


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """What the program answers: computed now where it is there, and then the golden files must agree."""

    def answer(name: str) -> Reference:
        golden = goldens.answers(name)
        if not there("torch", "peft", "mlx_lm"):
            return golden
        from adapters.make_adapters import LIVE

        config, file, shapes, live = LIVE[name](name, model, tmp_path_factory.mktemp("live") / name)
        stored = goldens.read(name)
        assert (config, file) == (stored["config"], stored["file"]), goldens.REMEDY
        assert {key: tuple(shape) for key, (_, shape) in stored["tensors"].items()} == shapes, goldens.REMEDY
        assert set(live) == set(golden.arrays), goldens.REMEDY
        for key, array in live.items():
            stale = golden.error(key, array) > STALE * (1 if "logits" in key else 40)
            assert not stale, f"{key} of {name} has changed: {goldens.REMEDY}"
        return Reference(live)

    return answer


@pytest.fixture
def read(model: Path, tmp_path: Path) -> Callable[..., Adapter]:
    def golden(name: str, scale: float = 1.0) -> Adapter:
        return read_adapter(goldens.write(name, tmp_path / name, model), open_checkpoint(model), scale)

    return golden


@pytest.mark.core(4)
@pytest.mark.parametrize("name", [*goldens.PEFT, *goldens.MLX])
def test_a_fused_adapter_gives_the_logits_of_the_program_that_made_it(
    name: str, model: Path, read: Callable[..., Adapter], answers: Callable[[str], Reference]
) -> None:
    made = fused_model(open_checkpoint(model), read(name))
    assert answers(name).error("logits", np.array(made(mx.array(goldens.TOKENS)[None])[0])) < NEAR


@pytest.mark.parametrize("name", goldens.OF_VISION)
def test_low_rank_parts_of_the_vision_encoder_give_the_embeddings_of_peft(
    name: str, model: Path, read: Callable[..., Adapter], answers: Callable[[str], Reference]
) -> None:
    encoder = fused_encoder(open_checkpoint(model), read(name))
    media = vision_cases.media(goldens.MODEL, "adapted", goldens.GRID)
    assert answers(name).error("tower", encoder.encode(media)) < NEAR_OF_TOWER


# --- formats ---------------------------------------------------------------------------------------------------------


def same(a: Adapter, b: Adapter) -> bool:
    return a.pairs.keys() == b.pairs.keys() and all(
        x.scale == y.scale and mx.array_equal(x.a, y.a) and mx.array_equal(x.b, y.b)
        for x, y in ((a.pairs[name], b.pairs[name]) for name in a.pairs)
    )


def as_mlx_vlm(folder: Path, legacy: bool) -> None:
    """mlx-lm's folder as mlx-vlm 0.7.10 writes it (trainer/peft/utils.py), or before 0.6."""
    names = {"lora_a": "A", "lora_b": "B"} if legacy else {"lora_a": "lora_a", "lora_b": "lora_b"}
    tensors = dict(mx.load(str(folder / "adapters.safetensors")))
    modules = sorted({key.rpartition(".")[0] for key in tensors})
    tensors = {f"{module}.{new}": tensors[f"{module}.{old}"] for module in modules for old, new in names.items()}
    own = {"rank": 6, "dropout": 0.0, "scale": 1.5, "keys": modules}
    quantized = {"language_model.model.embed_tokens": {"group_size": 64, "bits": 4, "mode": "affine"}}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": own, "base_quantization": quantized}
    config = {"rank": 6, "alpha": 9, "dropout": 0.1} if legacy else config
    (folder / "adapters.safetensors").unlink()
    mx.save_safetensors(str(folder / ("adapters" if legacy else "weights")), tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("legacy", [False, True])
def test_mlx_vlm_has_the_tensors_of_mlx_lm_under_other_settings(
    legacy: bool, model: Path, read: Callable[..., Adapter], tmp_path: Path
) -> None:
    expected = read("mlx-lora")
    as_mlx_vlm(tmp_path / "mlx-lora", legacy)
    found = read_adapter(tmp_path / "mlx-lora", open_checkpoint(model))
    assert same(found, expected) and (expected.format, found.format) == ("mlx-lm", "mlx-vlm")


def test_a_square_factor_of_mlx_lm_is_transposed_too(read: Callable[..., Adapter]) -> None:
    key = "language_model.model.layers.2.linear_attn.in_proj_a.lora_b"
    pair = read("mlx-lora").pairs["model.language_model.layers.2.linear_attn.in_proj_a.weight"]
    assert pair.b.shape == (6, 6) and np.array_equal(pair.b, goldens.numbers(key, (6, 6)).T)


def test_whole_tensors_of_mlx_lm_become_raw(read: Callable[..., Adapter]) -> None:
    replaced = read("mlx-full").replaced
    layer, stored = "model.language_model.layers.2.", "language_model.model.layers.2."
    conv, norm, gated = "linear_attn.conv1d.weight", "input_layernorm.weight", "linear_attn.norm.weight"
    shape = replaced[layer + conv].shape
    assert shape[1:] == (1, 4)
    assert np.array_equal(replaced[layer + conv][:, 0], goldens.numbers(stored + conv, (shape[0], 4, 1))[..., 0])
    assert np.array_equal(replaced[layer + norm], goldens.numbers(stored + norm, (256,)) - 1)
    assert np.array_equal(replaced[layer + gated], goldens.numbers(stored + gated, (64,)))


def test_scales_of_peft_follow_its_patterns_and_ranks(read: Callable[..., Adapter]) -> None:
    pairs = {name.removeprefix("model.language_model."): pair for name, pair in read("peft-patterns").pairs.items()}
    told = {
        name: (len(pairs[f"layers.{name}.weight"].a), pairs[f"layers.{name}.weight"].scale)
        for name in ("0.mlp.up_proj", "1.mlp.up_proj", "2.mlp.up_proj", "3.self_attn.k_proj", "3.self_attn.v_proj")
    }
    assert told == {
        "0.mlp.up_proj": (3, 4 / 3), "1.mlp.up_proj": (4, 1.0), "2.mlp.up_proj": (3, 3.0),
        "3.self_attn.k_proj": (2, 25.0), "3.self_attn.v_proj": (2, 2.0),
    }  # fmt: skip  # k_proj before self_attn..., for peft sorts the patterns when it saves them
    assert read("peft-rslora-vision").pairs[UP].scale == pytest.approx(5 / 3**0.5)


def test_the_tensors_say_which_modules_are_adapted(model: Path, read: Callable[..., Adapter], tmp_path: Path) -> None:
    expected = read("peft-plain")
    edited(tmp_path / "peft-plain", target_modules=["nothing"])
    assert same(read_adapter(tmp_path / "peft-plain", open_checkpoint(model)), expected)


def test_a_scale_multiplies_the_adapters_own(read: Callable[..., Adapter]) -> None:
    assert read("peft-plain", 0.5).pairs[UP].scale == 0.75 == read("peft-plain").pairs[UP].scale / 2


# --- the table of tokens and its head --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "of_table", "of_head", "unties"),
    [
        ("peft-embedding", True, False, True),  # PEFT's head reads the table as it was
        ("peft-embedding-tied", True, True, False),
        ("mlx-embedding", True, True, False),
        ("peft-plain", False, False, False),
    ],
)
def test_a_head_has_low_rank_parts_of_its_own(
    name: str, of_table: bool, of_head: bool, unties: bool, read: Callable[..., Adapter]
) -> None:
    adapter = read(name)
    assert (TABLE in adapter.pairs, HEAD in adapter.pairs, adapter.unties) == (of_table, of_head, unties)
    assert not adapter.replaced  # the tables that PEFT stores beside are the model's own


def test_a_table_trained_whole_by_peft_leaves_the_head_as_it_was(model: Path, read: Callable[..., Adapter]) -> None:
    adapter = read("peft-table")
    assert adapter.unties and set(adapter.replaced) == {TABLE, HEAD}
    assert mx.array_equal(adapter.replaced[HEAD].astype(mx.float32), goldens.table(model))


def test_a_base_table_that_is_not_the_models_takes_its_place(
    model: Path, read: Callable[..., Adapter], tmp_path: Path
) -> None:
    read("peft-embedding")
    key = "base_model.model.model.language_model.embed_tokens.base_layer.weight"
    edited(tmp_path / "peft-embedding", {key: goldens.table(model) + 0.5})
    adapter = read_adapter(tmp_path / "peft-embedding", open_checkpoint(model))
    assert set(adapter.replaced) == {TABLE}
    assert mx.array_equal(adapter.replaced[TABLE], goldens.table(model) + 0.5)


# --- what is told of it ----------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_names_scales_and_numbers_alone(
    model: Path, read: Callable[..., Adapter], tmp_path: Path
) -> None:
    one = read("peft-plain")
    (tmp_path / "peft-plain").rename(tmp_path / "moved")
    edited(tmp_path / "moved", lora_dropout=0.5)
    checkpoint = open_checkpoint(model)
    assert read_adapter(tmp_path / "moved", checkpoint).fingerprint == one.fingerprint
    found = {one.fingerprint, read_adapter(tmp_path / "moved", checkpoint, 2).fingerprint}
    edited(tmp_path / "moved", lora_alpha=4)
    found.add(read_adapter(tmp_path / "moved", checkpoint).fingerprint)
    key = next(iter(shown_tensors(tmp_path / "moved")))
    edited(tmp_path / "moved", {key: mx.array(goldens.numbers(key, shown_tensors(tmp_path / "moved")[key])) * 1.001})
    found.add(read_adapter(tmp_path / "moved", checkpoint).fingerprint)
    assert len(found) == 4


def test_bytes_of_an_adapter_are_those_of_its_tensors(read: Callable[..., Adapter], tmp_path: Path) -> None:
    adapter = read("peft-dora")
    assert adapter.nbytes == sum(4 * int(np.prod(shape)) for shape in shown_tensors(tmp_path / "peft-dora").values())


def test_rows_of_dora_have_the_lengths_of_the_magnitudes(read: Callable[..., Adapter]) -> None:
    adapter = read("peft-dora")
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    weight = mx.array(goldens.numbers("weight", (256, 448)))
    rows = fused(weight, adapter.pairs[name], adapter.magnitudes[name])
    plain = fused(weight, adapter.pairs[name])
    lengths = mx.linalg.norm(rows, axis=1)
    assert mx.allclose(lengths, mx.abs(adapter.magnitudes[name]), rtol=1e-5)
    assert mx.allclose(rows / lengths[:, None], plain / mx.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)
