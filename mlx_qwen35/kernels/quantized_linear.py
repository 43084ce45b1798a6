"""x times the transpose of a packed matrix.

A GPU multiplies packed weights directly, for any number of rows. MLX's CPU backend does so at the speed of one row
after the other, so there many rows meet the unpacked matrix, a slice of it at a time.
"""

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import cpu
from mlx_qwen35.quantization import Quantization


def unpacks(x: mx.array) -> bool:
    """Whether so many rows (..., columns) meet an unpacked matrix here."""
    return backend().unpacks_for_many_rows and x.size >= cpu.MANY_ROWS * x.shape[-1]


def quantized_linear(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, packing: Quantization
) -> mx.array:
    """(..., columns) floating point -> (..., rows) of the same dtype; weight (rows, columns bits / 32) uint32.

    Scales in float32, which were kept so beside x in a half type, give float32.
    """
    form = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
    columns = x.shape[-1]
    if not unpacks(x):
        # As rows: one row that is part of a longer one keeps its stride otherwise, and MLX copies it first.
        rows = mx.quantized_matmul(x.reshape(-1, columns), weight, scales, biases, transpose=True, **form)
        return rows.reshape(*x.shape[:-1], -1)
    step, dtype = max(1, cpu.UNPACKED // columns), mx.float32 if scales.dtype == mx.float32 else x.dtype
    parts = []
    for row in range(0, weight.shape[0], step):
        rows = slice(row, row + step)
        # Behind its input and the part before, or MLX unpacks all of them first, and those of the layers to come.
        packed = mx.depends([weight[rows], scales[rows]], [x, *parts[-1:]])
        part = mx.dequantize(*packed, None if biases is None else biases[rows], **form)
        parts.append(x @ part.astype(dtype).T)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
