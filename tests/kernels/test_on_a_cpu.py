"""What the CPU does faster by other means: exponentials of many elements, and attention by blocks."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels import cpu, elementwise
from mlx_qwen35.kernels.attention import attention


@pytest.mark.parametrize("size", [1, cpu.MANY - 1, cpu.MANY, cpu.PIECE + 3])
def test_exp_sigmoid_and_silu_of_any_number_of_elements(size):
    x = np.linspace(-30, 30, size, dtype=np.float32)
    true = x.astype(np.float64)
    exact = {"exp": np.exp(true), "sigmoid": 1 / (1 + np.exp(-true)), "silu": true / (1 + np.exp(-true))}
    for name, values in exact.items():
        error = np.abs(np.array(getattr(elementwise, name)(mx.array(x))) - values) / np.maximum(1, np.abs(values))
        assert error.max() < 3e-6, name


def test_exp_and_sigmoid_at_the_ends(monkeypatch):
    monkeypatch.setattr(cpu, "MANY", 1)
    ends = mx.array([-np.inf, -200.0, 0.0, 200.0, np.inf, np.nan])
    np.testing.assert_allclose(np.array(elementwise.sigmoid(ends)), [0, 0, 0.5, 1, 1, np.nan], atol=1e-37)
    np.testing.assert_allclose(np.array(elementwise.exp(ends))[[0, 1, 2, 5]], [0, 0, 1, np.nan], atol=1e-37)
    assert elementwise.exp(ends)[4].item() > 1e37


@pytest.mark.parametrize(("T", "S"), [(16, 16), (130, 130), (129, 300), (257, 258)])
def test_causal_attention_by_blocks_is_attention(T, S):
    shapes = ((2, 6, T, 24), (2, 3, S, 24), (2, 3, S, 24))
    q, keys, values = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes))
    blocks = attention(q, keys, values, 0.2, "causal")
    whole = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.2, mask="causal")
    assert mx.abs(blocks - whole).max().item() < 2e-6
