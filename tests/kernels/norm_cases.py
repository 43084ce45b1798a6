"""Cases of the residual add with its norm: one call of either path, and how far is wrong."""

from typing import Any

import mlx.core as mx
import numpy as np

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# From 1 to the next number, twice half of which comes where the rounding of float32 decides; and float32's own.
STEP = {mx.float32: 2e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
WHOLE = 2560  # 4B


def case(shape: tuple[int, ...], dtype: mx.Dtype, scale: float = 1.0) -> tuple[mx.array, mx.array, mx.array, float]:
    """Stream, what is added, gamma, epsilon."""
    rng = np.random.default_rng(shape[-1])
    x, y = (mx.array((scale * rng.normal(size=shape)).astype(np.float32)).astype(dtype) for _ in range(2))
    return x, y, mx.array(rng.normal(1, 0.3, shape[-1:]).astype(np.float32)), 1e-6


def differences(ours: Any, want: Any) -> list[str]:
    """A sum with other bits, a norm further off than a step."""
    found = []
    (total, normed), (want_total, want_normed) = ((_numbers(x) for x in pair) for pair in (ours, want))
    if not np.array_equal(total, want_total):
        found.append(f"sum differs by {np.abs(total - want_total).max():.1e}")
    error = np.abs(normed - want_normed)
    if not (error <= STEP[ours[0].dtype] * np.maximum(np.abs(want_normed), 1e-3)).all():  # NaN too
        found.append(f"norm differs by {error.max():.1e}")
    return found


def unequal(ours: Any, want: Any) -> float:
    """The share of the numbers of the norm that are not equal."""
    return float((_numbers(ours[1]) != _numbers(want[1])).mean())


def _numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
