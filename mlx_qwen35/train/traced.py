"""Low-rank parts that are trained, as the adapter of all rows of a pass."""

from collections.abc import Mapping

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.kernels.by_hand import Arrays, by_hand
from mlx_qwen35.kernels.low_rank import ActiveAdapters, Maps
from mlx_qwen35.model.lora import stacked


def active(parameters: Mapping[str, Pair]) -> ActiveAdapters | None:
    """Low-rank parts, traced ones too, as the adapter of all rows of a pass; None where there are none."""
    return _Traced(parameters) if parameters else None


class _Traced(ActiveAdapters):
    """Whose gradients of A and B are there before that of x is used.

    MLX would compute them last, and hold the gradients of all products of a layer until then.
    """

    def __init__(self, parameters: Mapping[str, Pair]):
        super().__init__(lambda maps: stacked(maps, {0: parameters}), 0)

    def add(self, maps: Maps, x: mx.array, y: mx.array) -> mx.array:
        low = self.lookup(maps) if backend().differentiates else None
        own = None if low is None else low.of(0)
        if own is None:
            return super().add(maps, x, y)
        added = by_hand(_low_rank, _gradient, x.reshape(-1, x.shape[-1]), *own)
        return y + added.reshape(y.shape).astype(y.dtype)


def _low_rank(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """x (n, in), A (R, in), B (out, R) -> (n, out) float32."""
    return (x @ a.T) @ b.T


def _gradient(primals: Arrays, dy: mx.array, y: mx.array) -> Arrays:
    x, a, b = primals
    inner = dy @ b
    da, db = inner.T @ x.astype(inner.dtype), dy.T @ (x @ a.T)
    dx = inner @ a
    return [mx.depends([dx], [da, db])[0].astype(x.dtype), da, db]
