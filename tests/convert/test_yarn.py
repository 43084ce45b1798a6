"""--rope-scaling of the converter: what transformers, mlx-lm and we compute with the folder that it writes."""

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_text_model
from converting import nearest, unpacked
from geometries import changed
from refusing import refused

from mlx_qwen35 import load
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.card import Facts, card

IDS = np.random.default_rng(7).integers(0, 980, (1, 40))
TOLERANCE = 1e-4  # float32 sums of another order
SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144}


@pytest.fixture(scope="module")
def scaled(source_of, tmp_path_factory):
    return unpacked(source_of("float32"), tmp_path_factory.mktemp("yarn") / "out", rope_scaling="yarn:4")


def text_config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["text_config"]


def logits(folder) -> np.ndarray:
    return np.array(load_text_model(folder)(mx.array(IDS)))


def test_the_block_is_transformers_and_nothing_else_changes(scaled, source_of):
    source, written = text_config(source_of("float32")), text_config(scaled)
    assert written.pop("rope_parameters") == source.pop("rope_parameters") | SCALING
    assert written == source
    assert open_checkpoint(scaled).config.text.max_position_embeddings == 1_048_576


def test_the_card_says_it(scaled, source_of):
    facts = Facts("tiny", "tiny", "bf16")
    text = card(open_checkpoint(scaled), facts)
    assert "1,048,576 tokens" in text and "YaRN, factor 4 " in text and "mlx-vlm ignores it" in text
    assert "YaRN" not in card(open_checkpoint(source_of("float32")), facts)


def test_converting_again_changes_nothing(scaled, tmp_path):
    again = unpacked(scaled, tmp_path / "again", rope_scaling="yarn")
    kept = unpacked(scaled, tmp_path / "kept")
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        assert (again / name).read_bytes() == (kept / name).read_bytes() == (scaled / name).read_bytes()
    plain = unpacked(scaled, tmp_path / "plain", rope_scaling="none")
    assert open_checkpoint(plain).config.text.rope.yarn is None


def test_loading_with_the_option_is_loading_the_converted_folder(scaled, source_of):
    model, _ = load(source_of("float32"), dtype="float32", rope_scaling="yarn:4")
    assert mx.array_equal(model(mx.array(IDS)), load_text_model(scaled)(mx.array(IDS)))
    plain, _ = load(scaled, dtype="float32", rope_scaling="none")
    assert np.array_equal(np.array(plain(mx.array(IDS))), logits(source_of("float32")))


def test_mlx_lm_computes_the_same(scaled, source_of):
    pytest.importorskip("mlx_lm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm.utils import load_model
    theirs = np.array(load_model(scaled)[0](mx.array(IDS)))
    assert np.abs(logits(scaled) - theirs).max() < TOLERANCE
    assert np.abs(logits(source_of("float32")) - theirs).max() > 100 * TOLERANCE


def test_transformers_computes_the_same(scaled):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(scaled, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(IDS)).logits.numpy()
    assert np.abs(logits(scaled) - theirs).max() < TOLERANCE


def test_a_source_that_claims_more_than_it_was_trained_on_is_converted_with_the_option_alone(checkpoint_copy, tmp_path):
    source = checkpoint_copy(vision=False, mtp=False)
    config = changed(geometry("tiny"), max_position_embeddings=1_048_576)
    (source / "config.json").write_text(json.dumps(config))
    with refused("config_field_unsupported", "rope_scaling='yarn'"):
        convert(source, tmp_path / "out")
    folder = nearest(source, tmp_path / "out", recipe="4bit", rope_scaling="yarn:2")
    assert text_config(folder)["max_position_embeddings"] == 262_144
    assert open_checkpoint(folder).config.text.max_position_embeddings == 524_288


def test_a_wrong_scaling_is_refused(source_of, tmp_path):
    with refused("option_invalid", "--rope-scaling", "'linear'"):
        convert(source_of("float32"), tmp_path / "out", rope_scaling="linear")
