"""What of a conversion to float16 does not fit it, found by reading the weights once before anything is written.

The rule is that of mlx_qwen35/half.py, which tells the same of a folder when it is loaded in float16.
"""

import warnings
from collections.abc import Mapping

import numpy as np

from mlx_qwen35.checkpoint.float16 import SMALLEST, complaint, listed
from mlx_qwen35.checkpoint.names import is_zero_centred
from mlx_qwen35.convert.plan import Job
from mlx_qwen35.convert.source import as_float32


def takes_float16(job: Job) -> bool:
    """Whether the job casts numbers to float16 that may not fit."""
    if job.copies_parts:
        return job.outputs[-1].dtype == "F16" != job.source.parts[-1].dtype
    return job.dtype == "F16" != job.source.dtype


def extent(job: Job, bits: np.ndarray, dtype: str) -> tuple[float, int, int]:
    """Largest magnitude of some rows, how many of these vanish in float16, and how many there are.

    bits: (rows, columns) of the source, or of its scales or biases where they are copied. A vector is one row.
    """
    values = np.abs(as_float32(bits, dtype))
    rows = values.max(axis=1) if len(job.source.shape) > 1 else values.max(keepdims=True).ravel()
    if is_zero_centred(job.source.name):  # one is added to it
        return float(rows.max()), 0, len(rows)
    if job.quantization and job.quantization.mode == "affine" and not job.copies_parts:
        rows = np.where(rows < SMALLEST * 2**job.quantization.bits, _scales(job, bits, dtype), rows)
    return float(values.max()), int(np.count_nonzero((rows > 0) & (rows < SMALLEST))), len(rows)


def _scales(job: Job, bits: np.ndarray, dtype: str) -> np.ndarray:
    """(rows,): the largest scale that the affine groups of a row will have, rather too small than too large."""
    groups = as_float32(bits, dtype).reshape(len(bits), -1, job.quantization.group_size)
    return np.ptp(groups, axis=2).max(axis=1) / (2**job.quantization.bits + 1)


def reason(extents: list[tuple[float, int, int]]) -> str | None:
    """Why a tensor does not fit float16, from the extents of its rows; None when it does, or is not even finite."""
    largest, (vanishing, rows) = max(extents)[0], np.sum(extents, axis=0)[1:].astype(int)
    if not np.isfinite(np.sum(extents)):
        return None
    return complaint(largest, vanishing, rows)


def warn(kept: Mapping[str, str]) -> None:
    """Warn of the tensors that are kept out of float16."""
    warnings.warn(
        f"{len(kept)} tensors stay out of float16, which cannot hold them: {listed(kept)}. They are stored as in the "
        "source, the scales of packed ones in bfloat16. With --dtype bfloat16 nothing is kept apart",
        RuntimeWarning,
        stacklevel=3,
    )
