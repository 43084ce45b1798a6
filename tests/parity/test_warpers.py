"""The processed distribution against transformers' logits warpers and processors, in the order that it applies them.

The golden file holds transformers' answers; where torch is there they are computed again and must agree with it.
Run this file as a program to write it anew.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.engine.distribution import process
from mlx_qwen35.engine.presets import Sampling

GOLDEN = Path(__file__).parent / "golden" / "warpers.npz"
ROWS, V = 3, 211
SETTINGS = {
    "temperature": {"temp": 0.7},
    "top_k": {"top_k": 13},
    "top_p": {"top_p": 0.83},
    "min_p": {"min_p": 0.07},
    "repetition": {"repetition_penalty": 1.4},
    "thinking": {"temp": 1.0, "top_k": 20, "top_p": 0.95},
    "instruct": {"temp": 0.7, "top_k": 20, "top_p": 0.8},
    "all": {"temp": 1.6, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Random logits (ROWS, V) and, for each row, tokens that were generated."""
    rng = np.random.default_rng(5)
    return rng.normal(0, 3, (ROWS, V)).astype(np.float32), rng.integers(0, V, (ROWS, 30))


def transformers_answer(settings: dict) -> np.ndarray:
    """Log-probabilities (ROWS, V) after transformers' processors, -inf where filtered."""
    import torch
    from transformers import generation as hf

    logits, tokens = inputs()
    steps = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temp": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    scores, ids = torch.tensor(logits), torch.tensor(tokens)
    for name, step in steps.items():
        if name in settings:
            scores = step(settings[name])(ids, scores)
    return torch.log_softmax(scores, -1).numpy()


def reference(name: str) -> np.ndarray:
    golden = np.load(GOLDEN)[name]
    try:
        import torch  # noqa: F401
    except ImportError:
        return golden
    live = transformers_answer(SETTINGS[name])
    np.testing.assert_allclose(
        live, golden, atol=1e-5, err_msg=f"{GOLDEN.name} is out of date: run {Path(__file__).name}"
    )
    return live


@pytest.mark.parametrize("name", SETTINGS)
def test_distribution(name: str):
    logits, tokens = inputs()
    counts = np.stack([np.bincount(row, minlength=V) for row in tokens]).astype(np.float32)
    ours = np.array(process(mx.array(logits), Sampling(**SETTINGS[name]), mx.array(counts)))
    expected = reference(name)
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected))
    np.testing.assert_allclose(ours, expected, atol=2e-5)  # float32 sums over 211 terms


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **{name: transformers_answer(settings) for name, settings in SETTINGS.items()})
