"""x W^T for a quantized matrix W.

A GPU multiplies quantized weights directly. MLX's CPU backend does so too, but takes as long for each row of x as for
the first, so there many rows are multiplied by the dequantized matrix, one slice of it after the other.
"""

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import cpu
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
    step, dtype = max(1, cpu.UNPACKED // columns), mx.float32 if scales.dtype == mx.float32 else x.dtype
    parts: list[mx.array] = []
    for start in range(0, weight.shape[0], step):
        some = slice(start, start + step)
        # After x and the part before, or MLX would dequantize all parts first, and those of later layers.
        packed, some_scales = mx.depends([weight[some], scales[some]], [x, *parts[-1:]])
        part = dequantize(packed, some_scales, None if biases is None else biases[some], quantization)
        parts.append(x @ part.astype(dtype).T)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
