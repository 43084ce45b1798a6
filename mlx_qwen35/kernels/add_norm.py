"""The residual add and the RMS norm that follows it, one launch of add_norm.metal where that is engaged.

`add_norm` chooses between the kernel and `plain_add_norm`, which is the definition.
"""

import functools
from collections.abc import Iterator

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import fused

THREADS = 256  # of a threadgroup, which owns a row


def add_norm(stream: mx.array, added: mx.array, gamma: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """stream + added, and the norm of that sum; both (..., D) in the dtype of `stream`. gamma: (D,) float32."""
    engaged = backend().fused_kernels and self_check(stream.shape[-1], stream.dtype)
    return (fused_add_norm if engaged else plain_add_norm)(stream, added, gamma, eps)


def rms_norm(x: mx.array, gamma: mx.array, eps: float) -> mx.array:
    """x / rms(x) * gamma over the last axis, in float32, rounded once to x's dtype. gamma: float32."""
    return mx.fast.rms_norm(x.astype(mx.float32), gamma, eps).astype(x.dtype)


def plain_add_norm(stream: mx.array, added: mx.array, gamma: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    total = stream + added
    return total, rms_norm(total, gamma, eps)


def fused_add_norm(stream: mx.array, added: mx.array, gamma: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    width = stream.shape[-1]
    inputs = {"stream": stream, "added": added, "gamma": gamma, "epsilon": eps}
    outputs = {name: (stream.shape, stream.dtype) for name in ("total", "normed")}
    template = {"Element": stream.dtype, "WIDTH": width, "THREADS": THREADS}
    grid = (THREADS, stream.size // width, 1)
    total, normed = fused.launch("add_norm", inputs, outputs, template, grid, (THREADS, 1, 1))
    return total, normed


@functools.cache
def self_check(width: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel agrees with the operations on this machine; if not, a warning says so, once."""
    return fused.agrees("add_norm", lambda: _cases(width, dtype))


def _cases(width: int, dtype: mx.Dtype) -> Iterator[fused.Case]:
    normal = functools.partial(mx.random.normal, stream=mx.cpu)
    stream, added, gamma = (normal((3, width), key=mx.random.key(i)) for i in range(3))
    stream, added, gamma = stream.astype(dtype), added.astype(dtype), gamma[0]
    (total, normed), (plain_total, plain_normed) = (
        f(stream, added, gamma, 1e-6) for f in (fused_add_norm, plain_add_norm)
    )
    yield "sum", total, plain_total, 0.0
    step = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]
    yield "norm", normed, plain_normed, step * mx.maximum(1.0, mx.abs(plain_normed.astype(mx.float32)))
