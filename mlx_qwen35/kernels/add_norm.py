"""The residual add and the RMS norm that follows it, in one launch of add_norm.metal where the kernel is enabled.

`plain_add_norm` is the definition. `add_norm` chooses between the two.
"""

import functools
from collections.abc import Iterator

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import fused

THREADS = 256  # of a threadgroup, which owns a row


def add_norm(stream: mx.array, added: mx.array, gamma: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """stream + added, and the norm of that sum; both (..., D) in the dtype of `stream`. gamma: (D,) float32."""
    enabled = backend().fused_kernels and self_check(stream.shape[-1], stream.dtype)
    return (fused_add_norm if enabled else plain_add_norm)(stream, added, gamma, eps)


def rms_norm(x: mx.array, gamma: mx.array, eps: float) -> mx.array:
    """x / rms(x) * gamma over the last axis, in float32, rounded once to x's dtype. gamma: float32."""
    return mx.fast.rms_norm(x.astype(mx.float32), gamma, eps).astype(x.dtype)


def plain_add_norm(stream: mx.array, added: mx.array, gamma: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    total = stream + added
    return total, rms_norm(total, gamma, eps)


def fused_add_norm(stream: mx.array, added: mx.array, gamma: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    width = stream.shape[-1]
    total, normed = fused.launch(
        "add_norm",
        inputs={"stream": stream, "added": added, "gamma": gamma, "epsilon": eps},
        outputs={name: (stream.shape, stream.dtype) for name in ("total", "normed")},
        template={"Element": stream.dtype, "WIDTH": width, "THREADS": THREADS},
        grid=(THREADS, stream.size // width, 1),
        threadgroup=(THREADS, 1, 1),
    )
    return total, normed


@functools.cache
def self_check(width: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel agrees with its definition on this machine. Warns once if it does not."""
    return fused.agrees("add_norm", lambda: _cases(width, dtype))


def _cases(width: int, dtype: mx.Dtype) -> Iterator[fused.Case]:
    stream, added, gamma = fused.normal_arrays((3, width), (3, width), (width,))
    call = (stream.astype(dtype), added.astype(dtype), gamma, 1e-6)
    (total, normed), (plain_total, plain_normed) = fused_add_norm(*call), plain_add_norm(*call)
    yield "sum", total, plain_total, 0.0
    yield "norm", normed, plain_normed, fused.ROUNDING[dtype] * mx.maximum(1.0, mx.abs(plain_normed.astype(mx.float32)))
