"""x W^T for a quantized matrix W.

A GPU multiplies quantized weights directly. MLX's CPU backend does so too, but takes as long for each row of x as for
the first, so there many rows are multiplied by the dequantized matrix, one slice of it after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import cpu
from mlx_qwen35.kernels.by_hand import Arrays, by_hand
from mlx_qwen35.quantization import Quantization


def dequantizes(x: mx.array) -> bool:
    """Whether x (..., columns) has so many rows that the matrix is dequantized first."""
    return backend().unpacks_for_many_rows and x.size >= cpu.MANY_ROWS * x.shape[-1]


def dequantize(weight: mx.array, scales: mx.array, biases: mx.array | None, quantization: Quantization) -> mx.array:
    """Rows of a quantized matrix, in the dtype of the scales, or where those are bytes, in bfloat16."""
    group_size, bits, mode = quantization.group_size, quantization.bits, quantization.mode
    return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)


def quantized_linear(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, quantization: Quantization
) -> mx.array:
    """(..., columns) floating point -> (..., rows) of the same dtype; weight (rows, columns bits / 32) uint32.

    float32 scales give float32, also for x in float16 or bfloat16.
    """
    columns = x.shape[-1]
    if not dequantizes(x):
        # As (rows, columns): a row cut out of a longer one would keep its stride, and MLX would copy it first.
        rows = mx.quantized_matmul(
            x.reshape(-1, columns), weight, scales, biases, transpose=True, group_size=quantization.group_size,
            bits=quantization.bits, mode=quantization.mode,
        )  # fmt: skip
        return rows.reshape(*x.shape[:-1], -1)
    slices = _Slices(weight, scales, biases, quantization)
    return by_hand(slices.product, slices.gradient, x) if backend().differentiates else slices.product(x)


@dataclass(frozen=True)
class _Slices:
    """A quantized matrix that is dequantized one slice of its rows after the other."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    quantization: Quantization

    def product(self, x: mx.array) -> mx.array:
        """x W^T, in float32 where the scales are, else in x's dtype."""
        dtype = mx.float32 if self.scales.dtype == mx.float32 else x.dtype
        parts: list[mx.array] = []
        for rows in self._rows(x.shape[-1]):
            parts.append(x @ self._part(rows, [x, *parts[-1:]]).astype(dtype).T)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def gradient(self, primals: Arrays, dy: mx.array, y: mx.array) -> Arrays:
        """dy W, in x's dtype."""
        total = None
        for rows in self._rows(primals[0].shape[-1]):
            part = self._part(rows, [dy] if total is None else [dy, total]).astype(dy.dtype)
            total = dy[..., rows] @ part if total is None else total + dy[..., rows] @ part
        assert total is not None
        return [total.astype(primals[0].dtype)]

    def _rows(self, columns: int) -> Iterator[slice]:
        step = max(1, cpu.UNPACKED // columns)
        return (slice(start, start + step) for start in range(0, self.weight.shape[0], step))

    def _part(self, rows: slice, after: list[mx.array]) -> mx.array:
        """Some rows, dequantized after other arrays: else MLX would dequantize all first, and those of later layers."""
        packed, scales = mx.depends([self.weight[rows], self.scales[rows]], after)
        return dequantize(packed, scales, None if self.biases is None else self.biases[rows], self.quantization)
