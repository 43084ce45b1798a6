"""Carries out a plan: every tensor is read, checked, converted and written in chunks of rows, on a few threads.

Sizes are known in advance, so each chunk goes to its own place in the file and memory does not grow with the model.
Each row is packed by itself: the bytes do not depend on the chunks.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.checkpoint import FP32_ORIGINAL, open_checkpoint
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.convert import float16
from mlx_qwen35.convert.journal import Done, Journal, damaged, differs, identity
from mlx_qwen35.convert.plan import Job, Plan
from mlx_qwen35.convert.progress import bytes_bar
from mlx_qwen35.convert.rows import convert_rows, difference_of, digest_of, extents_of, refusal
from mlx_qwen35.convert.source import check_unchanged
from mlx_qwen35.convert.verify import Error, Piece, check_copy, check_file, checksum, totals

CHUNK_BYTES = 4 << 20  # of the source; a thread holds about four times as much
BATCH_BYTES = 256 << 20  # of the source; what is done is noted for --resume after each
THREADS = min(4, os.cpu_count() or 1)

_thread = local()


@dataclass(frozen=True)
class Report:
    """What a conversion tells of what it wrote.

    errors: Hugging Face name of a tensor -> its error; sha256: name of a file -> its hash; both empty where it was not
    to verify. kept: Hugging Face name -> why float16 cannot hold the tensor.
    """

    errors: Mapping[str, Error]
    sha256: Mapping[str, str]
    kept: Mapping[str, str]


def write(plan: Plan, folder: Path, *, verify: bool = True) -> Report:
    """Write the planned checkpoint into an existing folder, config.json last: without it nothing loads.

    verify: measure errors, and read again what was written. A folder with a journal of the same plan is gone on with;
    otherwise it is empty. The journal stays until the folder is put in place: what follows may be killed too. Raises
    InputError when the source changes or holds what cannot be written, when the folder does not read back as written,
    or when its journal is another plan's.
    """
    check_unchanged(plan.sources)
    with Journal(folder, identity(plan, verify=verify, chunk=CHUNK_BYTES)) as journal:
        kept = _unfit(plan)
        journal.keep(kept)
        if kept:
            float16.warn(kept)
            plan = plan.keeping(kept)
        done = _write_weights(plan, folder, journal, verify)
        check_unchanged(plan.sources)
        chunks = _chunks(plan)
        sha256 = _check_shards(plan, folder, chunks, done) if verify else {}
        sha256 |= _write_others(plan, folder, verify)
        open_checkpoint(folder)
    return Report(_errors(chunks, done) if verify else {}, sha256, kept)


def _write_others(plan: Plan, folder: Path, verify: bool) -> dict[str, str]:
    """Copied files, index and configuration. Their hashes where they are to be verified."""
    sha256 = {}
    for file in plan.copied:
        shutil.copyfile(file, folder / file.name)
        if verify:
            sha256[file.name] = check_copy(folder / file.name, file)
    generation = {} if plan.generation is None else {"generation_config.json": plan.generation}
    for name, values in {INDEX: plan.index, **generation, "config.json": plan.config}.items():
        text = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
        (folder / name).write_bytes(text)
        if verify:
            sha256[name] = check_file(folder / name, [Piece(0, len(text), checksum(text), "its text")])
    return sha256


# --- chunks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Rows start <= row < stop (along the first axis) of one job's tensor."""

    job: Job
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.job.source.nbytes // self.job.source.shape[0]


def _chunks(plan: Plan) -> list[_Chunk]:
    return [chunk for job in plan.jobs for chunk in _chunks_of(job)]


def _chunks_of(job: Job) -> Iterator[_Chunk]:
    """Chunks of at most CHUNK_BYTES, counting two bytes a value at least: that is what they become."""
    source = job.source
    rows = source.shape[0]
    step = max(1, CHUNK_BYTES // max(source.parts[0].nbytes // rows, 2 * source.width))
    for start in range(0, rows, step):
        yield _Chunk(job, start, min(start + step, rows))


def _stream() -> mx.Stream:
    """Of this thread: each evaluates on one of its own, else they take turns."""
    if not hasattr(_thread, "stream"):
        _thread.stream = mx.new_stream(mx.cpu)
    return _thread.stream


@contextmanager
def _opened(plan: Plan) -> Iterator[dict[Path, int]]:
    """Descriptors of the source's files."""
    with ExitStack() as stack:
        files = {part.file for job in plan.jobs for part in job.source.parts}
        yield {file: stack.enter_context(file.open("rb")).fileno() for file in files}


def _each(
    chunks: list[_Chunk], function: Callable[[_Chunk], Any], what: str = "writing"
) -> Generator[tuple[_Chunk, Any]]:
    """Chunks with what the function gives, computed on a few threads, which end when the generator is closed.

    In order: of several faults the first counts.
    """
    if not chunks:
        return
    with ThreadPoolExecutor(THREADS) as pool, bytes_bar(what, sum(chunk.nbytes for chunk in chunks)) as bar:
        try:
            results = [pool.submit(function, chunk) for chunk in chunks]
            for chunk, result in zip(chunks, results, strict=True):
                bar.set_description(f"{what} {chunk.job.source.stored_name}", refresh=False)
                yield chunk, result.result()
                bar.update(chunk.nbytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _unfit(plan: Plan) -> dict[str, str]:
    """Hugging Face name -> why float16 cannot hold the tensor that is to become float16."""
    chunks = [chunk for chunk in _chunks(plan) if float16.takes_float16(chunk.job)]
    if not chunks:
        return {}
    extents: dict[str, list] = {}
    with _opened(plan) as sources:

        def look(chunk: _Chunk) -> list:
            return extents_of(chunk.job, chunk.start, chunk.stop, sources, _stream())

        with closing(_each(chunks, look, "looking what fits float16")) as results:
            for chunk, found in results:
                extents.setdefault(chunk.job.source.name, []).extend(found)
    reasons = {name: float16.reason(found) for name, found in extents.items()}
    return {name: why for name, why in reasons.items() if why}


# --- files -----------------------------------------------------------------------------------------------------------


def _write_at(file: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written


def _carry_out(
    chunk: _Chunk, plan: Plan, sources: Mapping[Path, int], places: Mapping[str, tuple[int, int]], verify: bool
) -> Done:
    """Convert one chunk. `places`: file descriptor and first byte of each output tensor."""
    job, stream = chunk.job, _stream()
    parts = convert_rows(job, chunk.start, chunk.stop, sources, plan.statistics.get(job.source.name), stream)
    if parts is None:
        raise refusal(job, [(other.start, other.stop) for other in _chunks_of(job)], sources, stream)
    checksums = []
    for output, part in zip(job.outputs, parts, strict=True):
        file, offset = places[output.name]
        data = memoryview(part).cast("B")
        _write_at(file, data, offset + chunk.start * (output.nbytes // output.shape[0]))
        checksums += [checksum(data)] if verify else []
    read = digest_of(job, chunk.start, chunk.stop, sources)
    if not verify:
        return Done(read)
    return Done(read, tuple(checksums), difference_of(job, chunk.start, chunk.stop, parts, sources, stream))


@contextmanager
def _shards(plan: Plan, folder: Path) -> Iterator[tuple[list[int], dict[str, tuple[int, int]]]]:
    """The output files at their full size, with what they hold of an earlier run: descriptors, and place of tensors."""
    with ExitStack() as stack:
        files, places = [], {}
        for shard in plan.shards:
            path = folder / shard.file
            file = stack.enter_context(path.open("r+b" if path.is_file() else "w+b", buffering=0)).fileno()
            _write_at(file, memoryview(shard.header), 0)
            os.ftruncate(file, shard.nbytes)
            files.append(file)
            places |= {name: (file, offset) for name, offset in shard.offsets.items()}
        yield files, places


def _written(plan: Plan, folder: Path, journal: Journal, verify: bool) -> dict[int, Done]:
    """The chunks that an earlier run has written, by number, once the source is known to hold what it read for them.

    None of them where a file is gone. OtherConversion when the source or the journal is another.
    """
    chunks, sizes = _chunks(plan), {folder / shard.file: shard.nbytes for shard in plan.shards}
    if not all(file.is_file() and file.stat().st_size == nbytes for file, nbytes in sizes.items()):
        journal.restart()
    if not journal.done:
        return {}
    for number, done in journal.done.items():
        if number >= len(chunks) or len(done.checksums) != (len(chunks[number].job.outputs) if verify else 0):
            raise damaged(folder, f"chunk {number} is none of this conversion's")
    with _opened(plan) as sources:
        there = [chunks[number] for number in journal.done]
        results = _each(there, lambda chunk: digest_of(chunk.job, chunk.start, chunk.stop, sources), "comparing")
        with closing(results):
            for (_, found), done in zip(results, journal.done.values(), strict=True):
                if found != done.source:
                    raise differs(folder, "the source changed")
    return dict(journal.done)


def _write_weights(plan: Plan, folder: Path, journal: Journal, verify: bool) -> dict[int, Done]:
    """Write the chunks that the journal does not have; returns all by number."""
    done = _written(plan, folder, journal, verify)
    left = {number: chunk for number, chunk in enumerate(_chunks(plan)) if number not in done}
    if done:
        print(f"resuming: {len(done)} of {len(done) + len(left)} chunks are there", file=sys.stderr)
    new: dict[int, Done] = {}
    with _opened(plan) as sources, _shards(plan, folder) as (files, places):

        def note() -> None:
            for file in files:
                os.fsync(file)
            journal.append(new)
            done.update(new)
            new.clear()

        read = 0
        work = list(left.values())
        results = _each(work, lambda chunk: _carry_out(chunk, plan, sources, places, verify))
        with closing(results):  # the threads end before the files are closed
            for number, (chunk, result) in zip(left, results, strict=True):
                new[number] = result
                read += chunk.nbytes
                if read >= BATCH_BYTES:
                    note()
                    read = 0
        note()
    return done


# --- what was written ------------------------------------------------------------------------------------------------


def _check_shards(plan: Plan, folder: Path, chunks: list[_Chunk], done: Mapping[int, Done]) -> dict[str, str]:
    """sha256 of the output files, read again and compared with the checksums of what was written."""
    pieces: dict[str, list[Piece]] = {name: [] for name in plan.index["weight_map"]}
    for number, chunk in enumerate(chunks):
        for output, known in zip(chunk.job.outputs, done[number].checksums, strict=True):
            row = output.nbytes // output.shape[0]
            pieces[output.name].append(Piece(chunk.start * row, (chunk.stop - chunk.start) * row, known, output.name))
    sha256 = {}
    with bytes_bar("reading again", sum(shard.nbytes for shard in plan.shards)) as bar:
        for shard in plan.shards:
            parts = [Piece(0, len(shard.header), checksum(shard.header), "its header")]
            for name, offset in shard.offsets.items():
                parts += [Piece(offset + piece.start, piece.nbytes, piece.checksum, name) for piece in pieces[name]]
            sha256[shard.file] = check_file(folder / shard.file, parts, bar.update)
    return sha256


def _errors(chunks: list[_Chunk], done: Mapping[int, Done]) -> dict[str, Error]:
    """Of every tensor where other programs read it; exact copies have none."""
    differences: dict[str, list] = {}
    for number, chunk in enumerate(chunks):
        if not chunk.job.outputs[0].name.startswith(FP32_ORIGINAL):
            differences.setdefault(chunk.job.source.name, []).append(done[number].difference)
    return totals(differences)
