"""Rows of one tensor on their way from the source to the file: checked, converted, compared."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen35.convert import float16
from mlx_qwen35.convert.plan import Job
from mlx_qwen35.convert.rounding import quantize
from mlx_qwen35.convert.source import BITS, FLOATS, as_float32, read_rows, read_values, unpack
from mlx_qwen35.convert.verify import Difference, difference
from mlx_qwen35.errors import InputError

_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}  # all ones in infinities and NaN, and only there

Files = Mapping[Path, int]  # the source's, open


def _not_finite(bits: np.ndarray, dtype: str) -> int:
    mask = BITS[dtype](_EXPONENT[dtype])
    return np.count_nonzero(bits & mask == mask)


def _cast(bits: np.ndarray, dtype: str, to: str, stream: mx.Stream) -> mx.array:
    return mx.view(mx.array(bits), FLOATS[dtype], stream=stream).astype(FLOATS[to], stream=stream)


def _as_bits(array: mx.array, stream: mx.Stream) -> np.ndarray:
    """The array's bytes without a copy; numpy has no bfloat16."""
    return np.asarray(mx.view(array, {2: mx.uint16, 4: mx.uint32}[array.itemsize], stream=stream))


def convert_rows(
    job: Job, start: int, stop: int, files: Files, weights: np.ndarray | None, stream: mx.Stream
) -> list[np.ndarray] | None:
    """What is written for rows of a job's tensor, one array for each output, bits in C order.

    weights: (columns,) float32, what an error in each column counts. None when a value is not finite or does not fit.
    """
    if job.copies_parts:
        return _copied(job, start, stop, files, stream)
    bits, dtype = read_values(job.source, start, stop, files, stream), job.source.dtype
    if _not_finite(bits, dtype):
        return None
    if job.dtype == dtype and job.quantization is None:
        return [bits]
    array = _cast(bits, dtype, job.dtype, stream)
    if job.dtype != dtype and _not_finite(_as_bits(array, stream), job.dtype):
        return None
    if job.quantization is None:
        return [_as_bits(array, stream)]
    packed = _pack(job, array, weights, stream)
    parts = [np.asarray(part) if part.dtype == mx.uint8 else _as_bits(part, stream) for part in packed]
    numbers = parts[1:] if job.quantization.mode == "affine" else ()
    return None if any(_not_finite(part, job.dtype) for part in numbers) else parts


def _pack(job: Job, array: mx.array, weights: np.ndarray | None, stream: mx.Stream) -> list[mx.array]:
    how = job.quantization
    if job.rounding == "search":
        return quantize(array, how, stream, weights)
    packed = mx.quantize(array, group_size=how.group_size, bits=how.bits, mode=how.mode, stream=stream)
    mx.eval(packed)
    return packed


def _copied(job: Job, start: int, stop: int, files: Files, stream: mx.Stream) -> list[np.ndarray] | None:
    """The parts of packed rows as they are, scales and biases cast where another dtype is asked for."""
    written = []
    for part, output in zip(job.source.parts, job.outputs, strict=True):
        bits = read_rows(part, start, stop, files)
        if output.dtype != part.dtype:
            bits = _as_bits(_cast(bits, part.dtype, output.dtype, stream), stream)
        if output.dtype in FLOATS and _not_finite(bits, output.dtype):
            return None
        written.append(bits)
    return written


def difference_of(
    job: Job, start: int, stop: int, parts: list[np.ndarray], files: Files, stream: mx.Stream
) -> Difference:
    """What the rows lose, from the parts that convert_rows gave."""
    same = [output.dtype for output in job.outputs] == [part.dtype for part in job.source.parts]
    if same and (job.quantization == job.source.how) and not job.source.folded:
        return Difference()
    values = read_values(job.source, start, stop, files, stream)
    if job.quantization:
        written = unpack(parts, [output.dtype for output in job.outputs], job.quantization, stream)
    else:
        written = as_float32(parts[0], job.dtype)
    return difference(as_float32(values, job.source.dtype), written)


def digest_of(job: Job, start: int, stop: int, files: Files) -> str:
    """Of the bytes that are read of the source for rows of a job's tensor."""
    found = hashlib.sha256()
    for part in job.source.parts:
        first, last = start, stop
        if job.source.block and part is job.source.parts[1]:  # factors, one for each block of rows
            high, _ = job.source.block
            first, last = start // high, -(-stop // high)
        found.update(read_rows(part, first, last, files))
    return found.hexdigest()[:32]


def extents_of(job: Job, start: int, stop: int, files: Files, stream: mx.Stream) -> list[tuple[float, int, int]]:
    """See float16.extent; of the scales and biases where these are what is cast."""
    if job.copies_parts:
        parts = [part for part in job.source.parts if part.dtype in FLOATS]
        return [float16.extent(job, read_rows(part, start, stop, files), part.dtype) for part in parts]
    return [float16.extent(job, read_values(job.source, start, stop, files, stream), job.source.dtype)]


def refusal(job: Job, rows: list[tuple[int, int]], files: Files, stream: mx.Stream) -> InputError:
    """The error for a tensor that holds values that cannot be written, counted over all its chunks of rows."""
    name, bad, over, values = job.source.stored_name, 0, 0, job.source.shape[0] * job.source.width
    for start, stop in rows:
        bits = read_values(job.source, start, stop, files, stream)
        bad += _not_finite(bits, job.source.dtype)
        over += _not_finite(_as_bits(_cast(bits, job.source.dtype, job.dtype, stream), stream), job.dtype)
    if bad:
        return InputError(
            "weights_not_finite",
            f"weights must be finite; {bad} of the {values} values of {name} are NaN or infinite. Download or make the "
            "source again",
        )
    if over:
        return InputError(
            "weights_overflow",
            f"weights must fit the output dtype; {over} of the {values} values of {name} overflow {job.dtype}. Choose "
            "--dtype bfloat16 or float32",
        )
    return InputError(
        "weights_overflow",
        f"the range of a group of weights must fit the dtype of its scale; one of {name} overflows {job.dtype}. Leave "
        "it unquantized, or give --rounding search",
    )
