"""Rotary position embedding of the text model's attention layers."""

import mlx.core as mx

from mlx_qwen35.checkpoint.config import RopeConfig
from mlx_qwen35.kernels.elementwise import compiled
from mlx_qwen35.kernels.norm_rotary import Table


class Rotary:
    """Interleaved M-RoPE: the position axis and the frequency of each pair of dims.

    Frequency i of dims / 2 follows the H axis for i = 1, 4, 7, ... and the W axis for i = 2, 5, 8, ..., up to the
    length of their sections, and the T axis otherwise (transformers, Qwen3_5TextRotaryEmbedding). For text the three
    axes are equal and this is plain rotary embedding.
    """

    def __init__(self, config: RopeConfig):
        half = config.dims // 2
        self.dims = config.dims
        # On the CPU, in the reference's order: the last bit of a frequency is 0.01 radians at position 262,144.
        exponents = mx.arange(half, dtype=mx.float32) * 2 / config.dims
        self.frequencies = mx.reciprocal(mx.power(config.theta, exponents, stream=mx.cpu), stream=mx.cpu)
        axes = [0] * half
        for axis in (1, 2):
            for i in range(axis, 3 * config.sections[axis], 3):
                axes[i] = axis
        self.axes = mx.array(axes)

    def table(self, positions: mx.array) -> Table:
        """positions (B, T), or (3, B, T) for T, H, W -> cos, sin, each (B, 1, T, dims / 2) float32."""
        positions = positions[..., None] if positions.ndim == 2 else mx.moveaxis(positions[self.axes], 0, -1)
        cos, sin = _circle(positions, self.frequencies)
        return cos[:, None], sin[:, None]


@compiled
def _circle(positions: mx.array, frequencies: mx.array) -> tuple[mx.array, mx.array]:
    angles = positions.astype(mx.float32) * frequencies
    return mx.cos(angles), mx.sin(angles)
