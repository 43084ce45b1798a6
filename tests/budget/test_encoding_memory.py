"""What an image or a video holds in memory: nothing when it has been read, and no more for a longer video."""

import pytest
from image_memory import noise, prompt, show  # of examples
from mlx.utils import tree_flatten

from mlx_qwen35.budget import encoding
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint


@pytest.fixture
def config(checkpoint_folder):
    return open_checkpoint(checkpoint_folder()).config.vision


def test_a_prompt_with_a_video_leaves_only_the_text_weights_in_memory(text_model, config):
    model = text_model()
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    shown = show(model, config, frames=4, height=32, width=64, step=16)
    assert shown["embeddings"] == 4 * 4 * model.config.hidden_size
    kept = shown["released"] - shown["text"]
    assert shown["embeddings"] <= kept < 2 * shown["embeddings"]  # in a buffer that was at hand
    assert shown["left"] == shown["text"] >= weights
    assert shown["encoder"] > 0 and not model.vision.loaded


@pytest.mark.full
def test_working_memory_does_not_grow_with_the_video(text_model, config, monkeypatch):
    """MLX frees while it computes, so that a peak varies by some percent; held whole, the long video would take 8
    times as much."""
    monkeypatch.setattr(encoding, "SLICE", 48)  # patches, two pairs of these frames
    monkeypatch.setattr("mlx_qwen35.kernels.cpu.SCORE_BYTES", 1 << 16)
    short, long = (show(text_model(), config, frames, height=64, width=96, step=56) for frames in (8, 64))
    assert long["encode_working"] < 1.3 * short["encode_working"]
    assert long["read_working"] < 1.5 * short["read_working"]
    assert long["encode_working"] < long["budget"]


def test_a_prompt_has_text_around_the_placeholders_of_every_pair(config):
    media = noise(config, 4, 32, 64)
    tokens, placeholders = prompt(media.grid, 2)
    assert sum(p.stop - p.start for p in placeholders) == media.tokens == 4
    assert [p.start for p in placeholders] == [8, 18] and len(tokens) == 28
