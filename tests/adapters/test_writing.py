"""Adapters that are written: read again here and by the programs they are for, and whole after an accident."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters import golden_adapters as goldens
from adapters.editing import CONFIG, MLX, PEFT
from adapters.fusing import fused_model
from parity.cases import Case
from refusing import refused

from mlx_qwen35.checkpoint.adapter import Pair, read_adapter
from mlx_qwen35.checkpoint.adapter_peft import DRAFT_HEAD
from mlx_qwen35.checkpoint.adapter_write import write_adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.names import TABLE
from mlx_qwen35.checkpoint.shapes import is_matrix

TEXT = "model.language_model.layers."


@pytest.fixture(scope="module")
def checkpoint(parity_folder: Callable[[Case], Path]) -> Checkpoint:
    """Without a draft head."""
    return open_checkpoint(parity_folder(goldens.MODEL))


def pairs_of(checkpoint: Checkpoint, *prefixes: str, alike: bool = False) -> dict[str, Pair]:
    """A low-rank part of each map whose name begins so; ranks and scales differ, unless they are alike."""
    maps = [n for n, shape in checkpoint.shapes.items() if is_matrix(n, shape) and n.startswith(prefixes)]
    found = {}
    for i, name in enumerate(maps):
        out, width = checkpoint.shapes[name]
        rank, scale = (2, 1.5) if alike else (2 + i % 3 // 2, (0.1, 1.5, 1.5, 3.0)[i % 4])
        a, b = goldens.numbers(f"{name} a", (rank, width)), goldens.numbers(f"{name} b", (out, rank))
        found[name] = Pair(mx.array(a), mx.array(b), scale)
    return found


def same(a: Pair, b: Pair) -> bool:
    return a.scale == pytest.approx(b.scale, rel=1e-12) and all(map(mx.array_equal, a[:2], b[:2]))


def delta(pair: Pair) -> mx.array:
    return pair.scale * pair.b @ pair.a


def test_what_is_written_for_peft_is_read_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pairs = pairs_of(checkpoint, "model.")
    write_adapter(tmp_path / "new" / "adapter", pairs, model="a/model")
    found = read_adapter(tmp_path / "new" / "adapter", checkpoint)
    assert found.format == "peft" and found.pairs.keys() == pairs.keys()
    assert all(same(found.pairs[name], pair) for name, pair in pairs.items())
    assert sorted(os.listdir(tmp_path / "new" / "adapter")) == [CONFIG, PEFT]
    config = json.loads((tmp_path / "new" / "adapter" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 3, "a/model")
    stored = mx.load(str(tmp_path / "new" / "adapter" / PEFT))
    table = "base_model.model.model.language_model.embed_tokens.lora_embedding_"
    assert (stored[f"{table}A"].shape, stored[f"{table}B"].shape) == ((2, 1024), (256, 2))


def test_what_is_written_for_mlx_lm_has_one_rank_and_scale(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pairs = pairs_of(checkpoint, TEXT)
    write_adapter(tmp_path, pairs, format="mlx-lm", model="a/model")
    found = read_adapter(tmp_path, checkpoint)
    assert found.format == "mlx-lm" and found.pairs.keys() == pairs.keys()
    assert {(len(pair.a), pair.scale) for pair in found.pairs.values()} == {(3, 1.5)}
    assert all(mx.allclose(delta(found.pairs[name]), delta(pair), atol=1e-6) for name, pair in pairs.items())
    write_adapter(tmp_path, alike := pairs_of(checkpoint, TEXT, alike=True), format="mlx-lm")
    assert all(same(read_adapter(tmp_path, checkpoint).pairs[name], pair) for name, pair in alike.items())


@pytest.mark.parametrize("format", ["peft", "mlx-lm"])
def test_the_draft_heads_parts_are_in_a_file_of_their_own(
    format: str, checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(checkpoint_folder())
    text, head = pairs_of(checkpoint, TEXT, alike=True), pairs_of(checkpoint, "mtp.")
    write_adapter(tmp_path, text | head, format=format)
    found = read_adapter(tmp_path, checkpoint)
    assert all(mx.allclose(delta(found.pairs[name]), delta(pair), atol=1e-6) for name, pair in head.items())
    assert not any("mtp." in name for name in mx.load(str(tmp_path / (PEFT if format == "peft" else MLX))))
    write_adapter(tmp_path, text, format=format)
    assert not (tmp_path / DRAFT_HEAD).exists() and read_adapter(tmp_path, checkpoint).pairs.keys() == text.keys()


def test_dtypes_are_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pairs = {n: p._replace(a=p.a.astype(mx.bfloat16)) for n, p in pairs_of(checkpoint, f"{TEXT}0.mlp.").items()}
    write_adapter(tmp_path, pairs)
    found = read_adapter(tmp_path, checkpoint).pairs.values()
    assert {(pair.a.dtype, pair.b.dtype) for pair in found} == {(mx.bfloat16, mx.float32)}


@pytest.mark.parametrize("prefix", ["model.visual.", TABLE])
def test_mlx_lm_has_no_vision_encoder_and_no_table_to_adapt(
    prefix: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with refused("adapter_unsupported", prefix):
        write_adapter(tmp_path / "adapter", pairs_of(checkpoint, TEXT, prefix), format="mlx-lm")
    assert not (tmp_path / "adapter").exists()


# --- accidents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["peft", "mlx-lm"])
def test_other_files_stay_and_tensors_of_the_other_format_go(
    format: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pairs = pairs_of(checkpoint, f"{TEXT}0.mlp.")
    write_adapter(tmp_path, pairs, format="peft" if format == "mlx-lm" else "mlx-lm")
    (tmp_path / "state.safetensors").write_text("mine")
    write_adapter(tmp_path, pairs, format=format)
    assert sorted(os.listdir(tmp_path)) == sorted([CONFIG, PEFT if format == "peft" else MLX, "state.safetensors"])


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("format", ["peft", "mlx-lm"])
def test_an_accident_leaves_no_numbers_of_one_adapter_with_the_scale_of_another(
    format: str, at: int, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs_of(checkpoint, f"{TEXT}0.mlp.")
    write_adapter(tmp_path, pairs)
    moved: list[Any] = []

    def replace(old: Path, new: Path) -> None:
        moved.append(new)
        if len(moved) == at:
            raise OSError(5, "as when the power goes")
        os.rename(old, new)

    monkeypatch.setattr(os, "replace", replace)
    other = {name: pair._replace(scale=7.0) for name, pair in pairs.items()}
    with refused("output_unwritable", tmp_path):
        write_adapter(tmp_path, other, format=format)
    assert len(moved) == at
    with refused("adapter_not_found"):
        read_adapter(tmp_path, checkpoint)
    monkeypatch.undo()
    write_adapter(tmp_path, other, format=format)
    assert {pair.scale for pair in read_adapter(tmp_path, checkpoint).pairs.values()} == {7.0}
    assert len(os.listdir(tmp_path)) == 2


def test_an_accident_with_the_same_settings_leaves_the_old_adapter(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs_of(checkpoint, f"{TEXT}0.mlp.")
    write_adapter(tmp_path, pairs)
    before = read_adapter(tmp_path, checkpoint).fingerprint

    def replace(old: Path, new: Path) -> None:
        raise OSError(5, "as when the power goes")

    monkeypatch.setattr(os, "replace", replace)
    with refused("output_unwritable"):
        write_adapter(tmp_path, {name: pair._replace(a=pair.a * 2) for name, pair in pairs.items()})
    assert read_adapter(tmp_path, checkpoint).fingerprint == before and len(os.listdir(tmp_path)) == 2


def test_a_folder_that_cannot_be_written_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("output_unwritable", tmp_path / "file"):
        write_adapter(tmp_path / "file" / "adapter", pairs_of(checkpoint, f"{TEXT}0.mlp."))


# --- by the programs that they are for -------------------------------------------------------------------------------


@pytest.mark.full
def test_peft_loads_what_is_written_into_transformers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from adapters.make_adapters import torch_answers, transformers_model

    pairs = pairs_of(checkpoint, "model.visual.", TEXT, TABLE)
    write_adapter(tmp_path, pairs, model=str(checkpoint.folder))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(transformers_model(checkpoint.folder), tmp_path).eval()
        state = peft.get_peft_model_state_dict(model)
    assert not [warning for warning in told if "missing" in str(warning.message)]
    stored = mx.load(str(tmp_path / PEFT))
    assert all(np.array_equal(state[key].numpy(), array) for key, array in stored.items())
    assert set(state) - set(stored) <= {"base_model.model.model.language_model.embed_tokens.base_layer.weight"}
    with torch.no_grad():
        expected = torch_answers(model, vision=False)["logits"]
    ours = fused_model(checkpoint, read_adapter(tmp_path, checkpoint))(mx.array(goldens.TOKENS)[None])[0]
    assert np.abs(np.array(ours) - expected).max() < 2e-5


@pytest.mark.full
def test_mlx_lm_loads_what_is_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("torch")  # make_adapters
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    from adapters.make_adapters import mlx_model

    write_adapter(tmp_path, pairs_of(checkpoint, TEXT), format="mlx-lm")
    expected = tuner.load_adapters(mlx_model(checkpoint.folder), str(tmp_path))(mx.array(goldens.TOKENS)[None])[0]
    ours = fused_model(checkpoint, read_adapter(tmp_path, checkpoint))(mx.array(goldens.TOKENS)[None])[0]
    assert mx.abs(ours - expected).max().item() < 2e-5
