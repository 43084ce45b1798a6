import mlx.core as mx
import pytest

from mlx_qwen35.bench import markers


@pytest.fixture
def marked(monkeypatch):
    """MLX as a process that counts sees it, for the length of a test."""
    for module, name in (
        *((mx.fast, name) for name in ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")),
        *((mx, name) for name in ("dequantize", "contiguous", "compile", "default_device")),
        (mx.metal, "is_available"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    real = dict(markers._state.real)
    markers.prepare()
    yield
    markers._state.real = real
