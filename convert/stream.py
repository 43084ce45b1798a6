"""Carries out a plan: every tensor is read, checked, converted and written in chunks of rows, on a few threads.

Sizes are known in advance, so each chunk goes to its own place in the file and memory does not grow with the model.
mx.quantize packs each row by itself: the bytes do not depend on the chunks.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import local

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_qwen35.checkpoint import DTYPE_BYTES, INDEX, Entry, open_checkpoint
from mlx_qwen35.convert.plan import Job, Plan
from mlx_qwen35.errors import InputError

CHUNK_BYTES = 4 << 20  # of the source; a thread holds about four times as much
THREADS = min(4, os.cpu_count() or 1)

_ARRAY_DTYPE = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
_BITS_DTYPE = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}  # all ones in infinities and NaN, and only there
_thread = local()


def write(plan: Plan, folder: Path) -> None:
    """Write the planned checkpoint into an existing empty folder, config.json last: without it nothing loads."""
    _write_weights(plan, folder)
    for file in plan.copied:
        shutil.copyfile(file, folder / file.name)
    _write_json(folder / INDEX, plan.index)
    if plan.generation is not None:
        _write_json(folder / "generation_config.json", plan.generation)
    _write_json(folder / "config.json", plan.config)
    open_checkpoint(folder)


def _write_json(file: Path, values: Mapping) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- chunks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Rows start <= row < stop (along the first axis) of one job's tensor."""

    job: Job
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * (self.job.source.nbytes // self.job.source.shape[0])


def _chunks(job: Job) -> Iterator[_Chunk]:
    rows = job.source.shape[0]
    step = max(1, CHUNK_BYTES // (job.source.nbytes // rows))
    for start in range(0, rows, step):
        yield _Chunk(job, start, min(start + step, rows))


def _read(chunk: _Chunk, sources: Mapping[Path, int]) -> np.ndarray:
    """The chunk's values as unsigned integers of their size: (rows, the other axes as one)."""
    source = chunk.job.source
    first = source.start + chunk.start * (source.nbytes // source.shape[0])
    data = os.pread(sources[source.file], chunk.nbytes, first)
    if len(data) != chunk.nbytes:
        raise InputError(f"{source.file} ended in the middle of {source.stored_name}: it changed while it was read")
    return np.frombuffer(data, _BITS_DTYPE[source.dtype]).reshape(chunk.stop - chunk.start, -1)


def _not_finite(bits: np.ndarray, dtype: str) -> int:
    mask = _BITS_DTYPE[dtype](_EXPONENT[dtype])
    return np.count_nonzero(bits & mask == mask)


def _cast(bits: np.ndarray, source: Entry, dtype: str, stream: mx.Stream) -> mx.array:
    array = mx.view(mx.array(bits), _ARRAY_DTYPE[source.dtype], stream=stream)
    return array.astype(_ARRAY_DTYPE[dtype], stream=stream)


def _as_bits(array: mx.array, stream: mx.Stream) -> np.ndarray:
    """The array's bytes without a copy; numpy has no bfloat16."""
    return np.asarray(mx.view(array, {2: mx.uint16, 4: mx.uint32}[array.itemsize], stream=stream))


def _convert(bits: np.ndarray, job: Job, stream: mx.Stream) -> list[np.ndarray] | None:
    """What is written for the rows, one array for each output; None when a value is not finite or does not fit."""
    if _not_finite(bits, job.source.dtype):
        return None
    if job.dtype == job.source.dtype and job.quantization is None:
        return [bits]
    array = _cast(bits, job.source, job.dtype, stream)
    if job.dtype != job.source.dtype and _not_finite(_as_bits(array, stream), job.dtype):
        return None
    if job.quantization is None:
        return [_as_bits(array, stream)]
    how = job.quantization
    packed = mx.quantize(array, group_size=how.group_size, bits=how.bits, mode=how.mode, stream=stream)
    mx.eval(packed)
    return [np.asarray(part) if part.dtype == mx.uint8 else _as_bits(part, stream) for part in packed]


def _refusal(job: Job, sources: Mapping[Path, int], stream: mx.Stream) -> InputError:
    """The error for a tensor that holds values that cannot be written, counted over the whole tensor."""
    name, bad, over = job.source.stored_name, 0, 0
    values = job.source.nbytes // DTYPE_BYTES[job.source.dtype]
    for chunk in _chunks(job):
        bits = _read(chunk, sources)
        bad += _not_finite(bits, job.source.dtype)
        over += _not_finite(_as_bits(_cast(bits, job.source, job.dtype, stream), stream), job.dtype)
    if bad:
        return InputError(
            f"weights must be finite; {bad} of the {values} values of {name} are NaN or infinite. Download or make the "
            "source again"
        )
    return InputError(
        f"weights must fit the output dtype; {over} of the {values} values of {name} overflow {job.dtype}. Choose "
        "--dtype bfloat16 or float32"
    )


# --- files -----------------------------------------------------------------------------------------------------------


def _write_at(file: int, data: np.ndarray, position: int) -> None:
    rest = memoryview(np.ascontiguousarray(data)).cast("B")
    while rest:
        written = os.pwrite(file, rest, position)
        rest, position = rest[written:], position + written


def _carry_out(chunk: _Chunk, sources: Mapping[Path, int], places: Mapping[str, tuple[int, int]]) -> None:
    """Convert one chunk. `places`: file descriptor and first byte of each output tensor."""
    if not hasattr(_thread, "stream"):  # each thread evaluates on a stream of its own, else they take turns
        _thread.stream = mx.new_stream(mx.cpu)
    parts = _convert(_read(chunk, sources), chunk.job, _thread.stream)
    if parts is None:
        raise _refusal(chunk.job, sources, _thread.stream)
    for output, part in zip(chunk.job.outputs, parts, strict=True):
        file, offset = places[output.name]
        _write_at(file, part, offset + chunk.start * (output.nbytes // output.shape[0]))


def _write_weights(plan: Plan, folder: Path) -> None:
    with ExitStack() as stack:
        sources = {
            file: stack.enter_context(file.open("rb")).fileno() for file in {job.source.file for job in plan.jobs}
        }
        places = {}
        for shard in plan.shards:
            file = stack.enter_context((folder / shard.file).open("wb", buffering=0))
            file.write(shard.header)
            file.truncate(shard.nbytes)
            places |= {name: (file.fileno(), offset) for name, offset in shard.offsets.items()}
        chunks = [chunk for job in plan.jobs for chunk in _chunks(job)]
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        bar = stack.enter_context(tqdm(total=sum(chunk.nbytes for chunk in chunks), unit="B", unit_scale=True))
        try:
            done = [pool.submit(_carry_out, chunk, sources, places) for chunk in chunks]
            for chunk, result in zip(chunks, done, strict=True):  # in order: of several faults the first is reported
                bar.set_description(chunk.job.source.stored_name, refresh=False)
                result.result()
                bar.update(chunk.nbytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
