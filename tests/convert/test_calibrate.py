"""Statistics of calibration: the mean squares of what each matrix of the text model reads."""

import mlx.core as mx
import numpy as np
import pytest
from geometries import changed

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.convert.calibrate import statistics
from mlx_qwen35.kernels.elementwise import silu
from mlx_qwen35.load import load_model

TEXT = "model.language_model."
TOKENS = [np.random.default_rng(i).integers(0, 1000, n).tolist() for i, n in enumerate((6, 15))]


@pytest.fixture(scope="module")
def found(raw):
    return statistics(open_checkpoint(raw), TOKENS)


def mean_square(arrays: list[mx.array]) -> np.ndarray:
    return np.square(np.concatenate([np.array(array)[0] for array in arrays])).mean(axis=0)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_every_matrix_of_the_text_model_has_its_columns(raw, found):
    shapes = text_shapes(open_checkpoint(raw).config.text)
    assert {name: (a.dtype, len(a)) for name, a in found.items()} == {
        name: (np.float32, shape[1]) for name, shape in shapes.items() if is_matrix(name, shape)
    }


def test_inputs_of_the_first_layer_are_the_normed_embeddings(raw, found):
    model = load_model(open_checkpoint(raw), mx.float32, "model")
    normed = [model.layers[0].input_layernorm(model.embed(mx.array([row]))) for row in TOKENS]
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"):
        assert close(found[f"{TEXT}layers.0.linear_attn.{name}.weight"], mean_square(normed))


@pytest.mark.parametrize("layer", [0, 3])
def test_inputs_of_an_mlp_are_those_of_the_model(raw, found, layer, monkeypatch):
    model = load_model(open_checkpoint(raw), mx.float32, "model")
    mlp, seen, inner = model.layers[layer].mlp, [], []
    original = type(mlp).__call__

    def spy(self, x, adapters):
        if self is mlp:
            seen.append(x)
            gate, up = self.gate_up(x)
            inner.append(silu(gate) * up)
        return original(self, x, adapters)

    monkeypatch.setattr(type(mlp), "__call__", spy)
    for row in TOKENS:
        model.hidden(mx.array([row]))
    path = f"{TEXT}layers.{layer}.mlp."
    assert close(found[f"{path}gate_proj.weight"], mean_square(seen))
    assert close(found[f"{path}up_proj.weight"], mean_square(seen))
    assert close(found[f"{path}down_proj.weight"], mean_square(inner))


@pytest.mark.parametrize(
    ("layer", "mixer", "name"), [(1, "linear_attn", "out_proj"), (3, "self_attn", "o_proj"), (3, "self_attn", "v_proj")]
)
def test_inputs_of_a_mixer_are_those_of_the_model(raw, found, layer, mixer, name):
    model = load_model(open_checkpoint(raw), mx.float32, "model")
    attribute = "qkv_proj" if name == "v_proj" else name
    part, seen = getattr(model.layers[layer], mixer), []
    inner = part[attribute]

    class Spy:
        def __call__(self, x, adapters):
            seen.append(x)
            return inner(x, adapters)

        def whole(self, x, adapters):
            seen.append(x)
            return inner.whole(x, adapters)

        def split(self, products):
            return inner.split(products)

    del part[attribute]
    setattr(part, attribute, Spy())
    for row in TOKENS:
        model.hidden(mx.array([row]))
    assert close(found[f"{TEXT}layers.{layer}.{mixer}.{name}.weight"], mean_square(seen))


def test_a_tied_embedding_counts_as_the_head(raw, found):
    model = load_model(open_checkpoint(raw), mx.float32, "model")
    hidden = [model.hidden(mx.array([row])) for row in TOKENS]
    assert close(found[f"{TEXT}embed_tokens.weight"], mean_square(hidden))


def test_an_embedding_that_is_not_tied_has_no_entry(tmp_path):
    source = write_random_checkpoint(tmp_path, changed(geometry("tiny"), tie_word_embeddings=False))
    found = statistics(open_checkpoint(source), TOKENS)
    assert "lm_head.weight" in found and f"{TEXT}embed_tokens.weight" not in found
