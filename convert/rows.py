"""Rows of one tensor on their way from the source to the file: read, checked, converted, compared."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen35.convert.plan import Job
from mlx_qwen35.convert.rounding import quantize
from mlx_qwen35.convert.source import BITS, FLOATS, as_float32, dequantize, read_rows, read_values
from mlx_qwen35.convert.verify import Difference, difference
from mlx_qwen35.errors import InputError

_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}  # all ones in infinities and NaN, and only there

Files = Mapping[Path, int]  # descriptors of the source's files


@dataclass(frozen=True)
class Chunk:
    """Rows start <= row < stop (along the first axis) of one job's tensor."""

    job: Job
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.job.source.nbytes // self.job.source.shape[0]

    def values(self, files: Files) -> np.ndarray:
        """The source's values, as bits of its dtype: (rows, the other axes as one)."""
        return read_values(self.job.source, self.start, self.stop, files)


def _not_finite(bits: np.ndarray, dtype: str) -> int:
    """The number of infinities and NaN."""
    mask = BITS[dtype](_EXPONENT[dtype])
    return int(np.count_nonzero(bits & mask == mask))


def _cast(bits: np.ndarray, dtype: str, to: str) -> mx.array:
    return mx.view(mx.array(bits), FLOATS[dtype], stream=mx.cpu).astype(FLOATS[to], stream=mx.cpu)


def _as_bits(array: mx.array) -> np.ndarray:
    """The array's bytes without a copy; numpy has no bfloat16."""
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.itemsize]
    return np.asarray(mx.view(array, unsigned, stream=mx.cpu))


def convert_rows(chunk: Chunk, files: Files, weights: np.ndarray | None) -> list[np.ndarray] | None:
    """The rows as they are written: one array of bits in C order for each output of the job.

    weights: (columns,) float32, the importance of an error in each column; None: all alike. Returns None when a value
    is not finite, in the source or as written.
    """
    job = chunk.job
    if job.copies_parts:
        return _copied(chunk, files)
    bits, dtype = chunk.values(files), job.source.dtype
    if _not_finite(bits, dtype):
        return None
    if job.dtype == dtype and job.quantization is None:
        return [bits]
    array = _cast(bits, dtype, job.dtype)
    if job.dtype != dtype and _not_finite(_as_bits(array), job.dtype):
        return None
    if job.quantization is None:
        return [_as_bits(array)]
    if job.rounding == "search":
        quantized = quantize(array, job.quantization, weights)
    else:
        quantized = list(mx.quantize(array, **asdict(job.quantization), stream=mx.cpu))
    parts = [_as_bits(part) for part in quantized]
    return None if _overflows(job, parts) else parts


def _copied(chunk: Chunk, files: Files) -> list[np.ndarray] | None:
    """The parts of quantized rows as they are; scales and biases are cast where the job's dtype is another."""
    parts = []
    for part, output in zip(chunk.job.source.parts, chunk.job.outputs, strict=True):
        bits = read_rows(part, chunk.start, chunk.stop, files)
        parts.append(bits if output.dtype == part.dtype else _as_bits(_cast(bits, part.dtype, output.dtype)))
    return None if _overflows(chunk.job, parts) else parts


def _overflows(job: Job, parts: list[np.ndarray]) -> bool:
    """Whether a scale or bias is not finite."""
    outputs = zip(job.outputs, parts, strict=True)
    return any(output.dtype in FLOATS and _not_finite(part, output.dtype) for output, part in outputs)


def difference_of(chunk: Chunk, parts: list[np.ndarray], files: Files) -> Difference:
    """The errors of rows, from the parts that convert_rows gave."""
    job, dtypes = chunk.job, [output.dtype for output in chunk.job.outputs]
    same = dtypes == [part.dtype for part in job.source.parts]
    changed = job.source.folded or job.source.is_fused
    if same and job.quantization == job.source.quantization and not changed:
        return Difference()
    written = dequantize(parts, dtypes, job.quantization) if job.quantization else as_float32(parts[0], job.dtype)
    return difference(as_float32(chunk.values(files), job.source.dtype), written)


def digest_of(chunk: Chunk, files: Files) -> str:
    """A digest of the bytes that are read of the source for rows."""
    found, source = hashlib.sha256(), chunk.job.source
    for part in source.parts:
        start, stop = chunk.start, chunk.stop
        if source.block and part is source.parts[1]:  # factors, one for each block of rows
            high, _ = source.block
            start, stop = start // high, -(-stop // high)
        found.update(read_rows(part, start, stop, files).data)
    return found.hexdigest()[:32]


def refusal(chunks: list[Chunk], files: Files) -> InputError:
    """The error for a tensor, given as all its chunks, with values that cannot be written."""
    job = chunks[0].job
    name, infinite, over, values = job.source.stored_name, 0, 0, job.source.shape[0] * job.source.width
    for chunk in chunks:
        bits = chunk.values(files)
        infinite += _not_finite(bits, job.source.dtype)
        over += _not_finite(_as_bits(_cast(bits, job.source.dtype, job.dtype)), job.dtype)
    if infinite:
        return InputError(
            "weights_not_finite",
            f"weights must be finite; {infinite} of the {values} values of {name} are NaN or infinite. Download or "
            "make the source again",
        )
    what, instead = f"{over} of the {values} values of {name}", "choose --dtype bfloat16 or float32"
    if not over:
        what = f"the scale of a group of {name}"
        instead = "leave it unquantized, or give --rounding search"
    return InputError("weights_overflow", f"weights must fit the output dtype; {what} overflows {job.dtype}: {instead}")
