"""Rotary position embedding of the text model's attention layers."""

import functools
import math
import warnings
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.config import RopeConfig
from mlx_qwen35.checkpoint.rope_fields import TRAINED, Yarn
from mlx_qwen35.kernels.elementwise import compiled
from mlx_qwen35.kernels.norm_rotary import Table

CHECKED = (0, 262_143, 1_048_575)  # positions: the first, and the last ones without YaRN and with its factor 4
EXACT = 1e-6  # the most that a cosine or sine may be off


class Rotary:
    """Interleaved M-RoPE: the position axis and the frequency of each pair of dims.

    Frequency i of dims / 2 follows the H axis for i = 1, 4, 7, ... and the W axis for i = 2, 5, 8, ..., up to the
    length of their sections, and the T axis otherwise (transformers, Qwen3_5TextRotaryEmbedding). For text the three
    axes are equal and this is plain rotary embedding.
    """

    def __init__(self, config: RopeConfig):
        self.config = config
        self.dims = config.dims
        self.frequencies = frequencies(config)
        self.factor = config.yarn.attention_factor if config.yarn else 1.0  # of cosines and sines
        axes = [0] * (config.dims // 2)
        for axis in (1, 2):
            for i in range(axis, 3 * config.sections[axis], 3):
                axes[i] = axis
        self.axes = mx.array(axes)

    def table(self, positions: mx.array) -> Table:
        """positions (B, T), or (3, B, T) for T, H, W -> cos, sin, each (B, 1, T, dims / 2) float32."""
        positions = positions[..., None] if positions.ndim == 2 else mx.moveaxis(positions[self.axes], 0, -1)
        circle = _circle if is_exact(self.config, mx.default_device().type) else _circle_on_cpu
        cos, sin = circle(positions, self.frequencies, self.factor)
        return cos[:, None], sin[:, None]


@compiled
def _circle(positions: mx.array, frequencies: mx.array, factor: float) -> tuple[mx.array, mx.array]:
    """Not mx.fast.rope, whose cosines on Metal are the fast ones, of the raw angle."""
    angles = positions.astype(mx.float32) * frequencies
    return mx.cos(angles) * factor, mx.sin(angles) * factor


def _circle_on_cpu(*given: mx.array | float) -> tuple[mx.array, mx.array]:
    with mx.stream(mx.cpu):
        return _circle(*given)


def frequencies(config: RopeConfig) -> mx.array:
    """(dims / 2,) float32, to the bit those of transformers: 1 / theta^(2 i / dims), where YaRN blends in a slower one.

    On the CPU, in the reference's order: the last bit of a frequency is 0.01 radians at position 262,144.
    """
    half = config.dims // 2
    with mx.stream(mx.cpu):
        periods = mx.power(config.theta, mx.arange(half, dtype=mx.float32) * 2 / config.dims)
        fast = mx.reciprocal(periods)
        if config.yarn is None:
            return fast
        low, high = _ramp(config, config.yarn)
        kept = 1 - mx.clip((mx.arange(half, dtype=mx.float32) - low) / (high - low), 0, 1)
        return mx.reciprocal(config.yarn.factor * periods) * (1 - kept) + fast * kept


def _ramp(config: RopeConfig, yarn: Yarn) -> tuple[float, float]:
    """Between which frequencies YaRN goes over from the plain ones to those divided by its factor."""

    def turning(times: float) -> float:
        """The frequency, as a real number, that turns so many times within the original length."""
        return config.dims * math.log(yarn.original / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = turning(yarn.beta_fast), turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dims - 1)
    return low, high + (0.001 if low == high else 0)


# --- the check -------------------------------------------------------------------------------------------------------


@functools.cache
def is_exact(config: RopeConfig, device: mx.DeviceType) -> bool:
    """Whether MLX's default device, of this type, computes the table to EXACT up to the last position.

    Warns once if it does not.
    """
    reach = config.yarn.original * config.yarn.factor if config.yarn else TRAINED
    error = table_error(config, [position for position in CHECKED if position < reach])
    if error > EXACT:
        warnings.warn(
            f"cosines of far positions are wrong by {error:.1e} here: the rotary table is computed on the CPU. Please "
            "report this with your chip and versions",
            RuntimeWarning,
            stacklevel=2,
        )
    return error <= EXACT


def table_error(config: RopeConfig, positions: Sequence[int] = CHECKED) -> float:
    """How far cosines and sines of MLX's default device are from the float64 ones of the same float32 angles."""
    turns, places = frequencies(config), np.array(positions, np.int32)[:, None]
    ours = _circle(mx.array(places), turns, 1.0)
    angles = (places.astype(np.float32) * np.array(turns)).astype(np.float64)
    exact = np.cos(angles), np.sin(angles)
    return max(float(np.abs(np.array(a) - b).max()) for a, b in zip(ours, exact, strict=True))
