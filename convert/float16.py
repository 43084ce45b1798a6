"""Tensors that do not fit float16, found by reading the weights once before anything is written.

The rule is that of mlx_qwen35/checkpoint/float16.py, by which a folder is loaded in float16.
"""

import warnings
from collections.abc import Mapping

import numpy as np

from mlx_qwen35.checkpoint.float16 import SMALLEST, listed, reason
from mlx_qwen35.checkpoint.names import is_zero_centred
from mlx_qwen35.convert.plan import Job
from mlx_qwen35.convert.rows import Chunk, Files
from mlx_qwen35.convert.source import FLOATS, as_float32, read_rows
from mlx_qwen35.quantization import Quantization

Extent = tuple[float, int, int]  # largest magnitude of some rows, how many of them vanish in float16, how many they are


def takes_float16(job: Job) -> bool:
    """Whether the job casts numbers to float16 that may not fit."""
    if job.copies_parts:
        return job.outputs[-1].dtype == "F16" != job.source.parts[-1].dtype
    return job.dtype == "F16" != job.source.dtype


def extents_of(chunk: Chunk, files: Files) -> list[Extent]:
    """The extents of the numbers that are cast to float16: values, or scales and biases that are copied."""
    job = chunk.job
    if not job.copies_parts:
        return [_extent(job, chunk.values(files), job.source.dtype)]
    parts = [part for part in job.source.parts if part.dtype in FLOATS]
    return [_extent(job, read_rows(part, chunk.start, chunk.stop, files), part.dtype) for part in parts]


def _extent(job: Job, bits: np.ndarray, dtype: str) -> Extent:
    """bits: (rows, columns). A vector is one row."""
    values = as_float32(bits, dtype)
    rows = np.abs(values).max(axis=1 if len(job.source.shape) > 1 else None, keepdims=True).ravel()
    largest = float(rows.max())
    if is_zero_centred(job.source.name):  # one is added to it
        return largest, 0, len(rows)
    if job.quantization and job.quantization.mode == "affine" and not job.copies_parts:
        low = rows < SMALLEST * 2**job.quantization.bits
        rows = np.where(low, _scales(values, job.quantization), rows)
    return largest, int(np.count_nonzero((rows > 0) & (rows < SMALLEST))), len(rows)


def _scales(values: np.ndarray, quantization: Quantization) -> np.ndarray:
    """(rows,): the largest scale that the affine groups of a row will have, rather too small than too large."""
    groups = values.reshape(len(values), -1, quantization.group_size)
    return np.ptp(groups, axis=2).max(axis=1) / (2**quantization.bits + 1)


def unfit(extents: list[Extent]) -> str | None:
    """The reason why a tensor does not fit float16, from the extents of its rows; None when it does.

    Values that are not finite are refused elsewhere.
    """
    if not np.isfinite(np.sum(extents)):
        return None
    largest, vanishing, rows = zip(*extents, strict=True)
    return reason(max(largest), sum(vanishing), sum(rows))


def warn(unfit: Mapping[str, str]) -> None:
    """Warn of the tensors that do not become float16."""
    warnings.warn(
        f"{len(unfit)} tensors stay out of float16, which cannot hold them: {listed(unfit)}. They are stored as in the "
        "source, the scales of quantized ones in bfloat16. With --dtype bfloat16 all tensors have one dtype",
        RuntimeWarning,
        stacklevel=3,
    )
