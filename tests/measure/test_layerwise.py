"""One layer in memory at a time gives what the whole model gives."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from geometries import changed
from refusing import refused

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.names import is_zero_centred
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.load import load_model
from mlx_qwen35.measure import layerwise
from mlx_qwen35.measure.layerwise import Layerwise, make_batches, read_rows

LENGTHS = (5, 40, 7, 7, 1)


def sequences(rng: np.random.Generator, lengths=LENGTHS) -> list[list[int]]:
    return [rng.integers(0, 1000, length).tolist() for length in lengths]


def worst(checkpoint: Checkpoint, tokens: list[list[int]]) -> float:
    """The largest difference from the model's logits, as a share of the largest logit."""
    model, whole = Layerwise(checkpoint, mx.float32), load_model(checkpoint, mx.float32, "model")
    batches = make_batches(tokens, checkpoint.config.text.vocab_size)
    states = model.embed(batches)
    for i in range(model.config.num_hidden_layers):
        model.advance(i, states)
    errors = []
    for batch, x in zip(batches, states, strict=True):
        logits = mx.concatenate([part(model.norm()(x)) for _, part in model.head()], axis=-1)
        expected = whole(mx.array(batch.tokens))
        errors.append((mx.abs(logits - expected).max() / mx.abs(expected).max()).item())
    return max(errors)


def as_other_programs_write(folder: Path, target: Path) -> Path:
    """A raw folder with conv1d moved and norms as gamma, as mlx-lm and mlx-vlm write it."""
    target.mkdir()
    arrays = {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
    for name, array in arrays.items():
        if name.endswith("conv1d.weight"):
            arrays[name] = array.swapaxes(1, 2)
        elif name.endswith("patch_embed.proj.weight"):
            arrays[name] = mx.moveaxis(array, 1, -1)
        elif is_zero_centred(name):
            arrays[name] = array.astype(mx.float32) + 1
    mx.save_safetensors(str(target / "model.safetensors"), arrays)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.fixture(params=["raw", "rewritten", "4 bit", "nvfp4", "untied"])
def checkpoint(request, raw, tmp_path) -> Checkpoint:
    makers: dict[str, Callable[[], Path]] = {
        "raw": lambda: raw,
        "rewritten": lambda: as_other_programs_write(raw, tmp_path / "out"),
        "4 bit": lambda: convert(raw, tmp_path / "out", quantize=True),
        "nvfp4": lambda: convert(raw, tmp_path / "out", quantize=True, q_mode="nvfp4"),
        "untied": lambda: write_random_checkpoint(tmp_path, changed(geometry("tiny"), tie_word_embeddings=False)),
    }
    return open_checkpoint(makers[request.param]())


@pytest.mark.core(2)
def test_logits_are_those_of_the_whole_model(checkpoint, rng):
    assert worst(checkpoint, sequences(rng)) < 1e-5


def test_chunks_and_slices_of_the_head_change_nothing(raw, rng, monkeypatch):
    monkeypatch.setattr(layerwise, "CHUNK", 12)
    monkeypatch.setattr(layerwise, "HEAD_ROWS", 300)
    assert worst(open_checkpoint(raw), sequences(rng)) < 1e-5


@pytest.mark.core(1)
@pytest.mark.parametrize("options", [{}, {"quantize": True, "q_bits": 3}, {"quantize": True, "q_mode": "mxfp4"}])
def test_products_by_numpy_are_those_of_mlx(raw, tmp_path, rng, options):
    model = Layerwise(open_checkpoint(convert(raw, tmp_path / "out", **options)), mx.float32)
    product = model.layer(0).mlp.down_proj
    x = mx.array(rng.standard_normal((2, 3, model.config.intermediate_size), np.float32))
    expected = product.inner(x)
    assert type(product).__name__ == "_Product" and mx.abs(product(x) - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_streams_are_in_the_dtype_asked_for(raw, rng, dtype):
    model = Layerwise(open_checkpoint(raw), dtype)
    states = model.embed(make_batches(sequences(rng), 1024))
    model.advance(0, states)
    assert {x.dtype for x in states} == {dtype}
    assert all(mx.isfinite(x).all() for x in states)


def test_nothing_of_a_layer_stays_in_memory(raw, rng):
    model = Layerwise(open_checkpoint(raw), mx.float32)
    states = model.embed(make_batches(sequences(rng), 1024))
    model.advance(0, states)  # constants of the first pass stay
    before = mx.get_active_memory()
    layer = model.layer(1)
    held = mx.get_active_memory() - before
    del layer
    model.advance(1, states)
    assert held > 1_000_000 and mx.get_active_memory() - before < held / 20


def test_altered_weights_are_what_a_layer_is_built_from(raw, rng):
    def without_up(weights):
        for name in weights.arrays:
            if name.endswith("up_proj.weight"):
                weights.arrays[name] = mx.zeros_like(weights.arrays[name])
        return weights

    layer = Layerwise(open_checkpoint(raw), mx.float32, without_up).layer(0)
    assert isinstance(layer, nn.Module) and not layer.mlp(mx.ones((1, 1, 256))).any()


def test_sequences_of_one_length_pass_together():
    batches = make_batches([[1, 2], [3], [4, 5]], 10)
    assert [(batch.rows, batch.tokens.tolist()) for batch in batches] == [((1,), [[3]]), ((0, 2), [[1, 2], [4, 5]])]


def test_batches_hold_no_more_than_a_chunk_of_tokens(monkeypatch):
    monkeypatch.setattr(layerwise, "CHUNK", 5)
    assert [batch.tokens.shape for batch in make_batches([[1, 2]] * 3 + [[1] * 9], 10)] == [(2, 2), (1, 2), (1, 9)]


@pytest.mark.parametrize("tokens", [[], [[1], []]])
def test_an_empty_sequence_is_refused(tokens):
    with refused("tokens_invalid", "1"):
        make_batches(tokens, 10)


@pytest.mark.parametrize("token", [10, -1])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with refused("tokens_invalid", "0", "9", token):
        make_batches([[1, token]], 10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_read_are_those_of_the_file(source_of, dtype):
    name = "model.language_model.embed_tokens.weight"
    entry = open_checkpoint(source_of(dtype)).entries[name]
    rows = np.array([0, 3, 4, 5, 900, 1023])
    whole = mx.load(str(entry.file))[entry.stored_name]
    found = read_rows(entry, rows)
    assert found.dtype == whole.dtype and mx.array_equal(found, whole[mx.array(rows)])


def test_a_file_that_became_shorter_is_refused(raw):
    entry = open_checkpoint(raw).entries["model.language_model.embed_tokens.weight"]
    with refused("source_changed", "embed_tokens.weight"):
        read_rows(replace(entry, start=entry.file.stat().st_size - 100), np.arange(1024))
