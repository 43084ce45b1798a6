"""A plan carried out: every tensor is read, checked, converted and written in chunks of rows, on a few threads.

Sizes are known in advance, so each chunk has its place in the file and memory does not grow with the model. Each row
is quantized by itself: the bytes do not depend on the chunks.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from zlib import crc32

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.console.notices import tell
from mlx_qwen35.convert import float16
from mlx_qwen35.convert.journal import Done, Journal, damaged, differs, identity
from mlx_qwen35.convert.plan import ConversionPlan, Job
from mlx_qwen35.convert.rows import Chunk, Files, convert_rows, difference_of, digest_of, refusal
from mlx_qwen35.convert.source import check_unchanged
from mlx_qwen35.convert.supply import Supply
from mlx_qwen35.convert.verify import Difference, FileRange, check_file

CHUNK_BYTES = 4 << 20  # of the source; a thread holds about four times as much
BATCH_BYTES = 256 << 20  # of the source; what is done is noted for --resume after each
THREADS = min(4, os.cpu_count() or 1)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Report:
    """What a conversion tells of the tensors, by Hugging Face name.

    errors: empty without verification. unfit: the reason why float16 cannot hold the tensor.
    """

    errors: Mapping[str, Difference]
    unfit: Mapping[str, str]


def write(plan: ConversionPlan, folder: Path, *, verify: bool = True, supply: Supply | None = None) -> Report:
    """Write the planned checkpoint into an existing folder, config.json last: without it nothing loads.

    verify: measure errors, and read again what was written. supply: where the files of weights come from; by default
    they are where the plan says. Resumes if the folder holds this plan's journal; otherwise
    the folder must be empty. The journal stays, for what follows may be killed too. Raises InputError when the source
    changes or holds what cannot be written, when the folder does not read back as written, or when its journal is
    another plan's.
    """
    supply = supply or Supply()
    check_unchanged(plan.sources)
    with Journal(folder, identity(plan, verify=verify, chunk=CHUNK_BYTES, commit=supply.commit)) as journal:
        unfit = _unfit(plan, supply)
        journal.note_unfit(unfit)
        if unfit:
            float16.warn(unfit)
            plan = plan.without_float16(unfit)
        chunks = [chunk for job in plan.jobs for chunk in _chunks_of(job)]
        done = _write_weights(plan, chunks, folder, journal, verify, supply)
        check_unchanged(plan.sources)
        if verify:
            _check_shards(plan, chunks, folder, done, supply)
        _write_others(plan, folder, verify)
        open_checkpoint(folder)
    errors: dict[str, Difference] = defaultdict(Difference)
    for number, chunk in enumerate(chunks):
        if verify and not chunk.job.is_original:
            errors[chunk.job.source.name] += done[number].difference
    return Report(errors, unfit)


def _write_others(plan: ConversionPlan, folder: Path, verify: bool) -> None:
    """Copied files, index and configuration."""
    for file in plan.copied:
        shutil.copyfile(file, folder / file.name)
        if verify:
            _check_text(folder / file.name, file.read_bytes())
    generation = {} if plan.generation is None else {"generation_config.json": plan.generation}
    for name, values in {INDEX: plan.index, **generation, "config.json": plan.config}.items():
        text = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
        (folder / name).write_bytes(text)
        if verify:
            _check_text(folder / name, text)


def _check_text(file: Path, text: bytes) -> None:
    check_file(file, [FileRange(0, len(text), crc32(text), "its text")])


# --- chunks ----------------------------------------------------------------------------------------------------------


def _chunks_of(job: Job) -> Iterator[Chunk]:
    """Chunks of at most CHUNK_BYTES, counting two bytes a value at least: that is what they become."""
    source = job.source
    rows = source.shape[0]
    step = max(1, CHUNK_BYTES // max(source.parts[0].nbytes // rows, 2 * source.width))
    for start in range(0, rows, step):
        yield Chunk(job, start, min(start + step, rows))


def _each(
    chunks: Collection[Chunk], function: Callable[[Chunk], Found], what: str, supply: Supply
) -> Generator[tuple[Chunk, Found]]:
    """Chunks with the results of the function, computed on a few threads, which end when the generator is closed.

    In order: of several faults the first counts.
    """
    if not chunks:
        return
    with ThreadPoolExecutor(THREADS) as pool, supply.bar(what, sum(chunk.nbytes for chunk in chunks)) as bar:
        try:
            results = [pool.submit(function, chunk) for chunk in chunks]
            for chunk, result in zip(chunks, results, strict=True):
                bar.set_description(f"{what} {chunk.job.source.stored_name}", refresh=False)
                yield chunk, result.result()
                bar.update(chunk.nbytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _unfit(plan: ConversionPlan, supply: Supply) -> dict[str, str]:
    """Hugging Face name -> the reason why float16 cannot hold the tensor that is to become float16."""
    chunks = [chunk for job in plan.jobs if float16.takes_float16(job) for chunk in _chunks_of(job)]
    if not chunks:
        return {}
    assert supply.stays, "they are read again to be converted"
    extents: dict[str, list[float16.Extent]] = defaultdict(list)
    with supply.held(supply.stretch(dict(enumerate(chunks)))) as sources:
        what = "looking what fits float16"
        with closing(_each(chunks, lambda chunk: float16.extents_of(chunk, sources), what, supply)) as results:
            for chunk, found in results:
                extents[chunk.job.source.name] += found
    return {name: why for name, found in extents.items() if (why := float16.unfit(found))}


# --- files -----------------------------------------------------------------------------------------------------------


def _write_at(file: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written


def _carry_out(
    chunk: Chunk, plan: ConversionPlan, sources: Files, places: Mapping[str, tuple[int, int]], verify: bool
) -> Done:
    """Convert and write one chunk. places: descriptor and first byte of each output tensor."""
    job = chunk.job
    parts = convert_rows(chunk, sources, plan.statistics.get(job.source.name))
    if parts is None:
        raise refusal(list(_chunks_of(job)), sources)
    checksums = []
    for output, part in zip(job.outputs, parts, strict=True):
        file, offset = places[output.name]
        data = part.data.cast("B")
        _write_at(file, data, offset + chunk.start * (output.nbytes // output.shape[0]))
        checksums += [crc32(data)] if verify else []
    read = digest_of(chunk, sources)
    return Done(read, tuple(checksums), difference_of(chunk, parts, sources)) if verify else Done(read)


@contextmanager
def _shards(plan: ConversionPlan, folder: Path) -> Iterator[tuple[list[int], dict[str, tuple[int, int]]]]:
    """The output files at their full size, with what an earlier run wrote: descriptors, and places of tensors."""
    with ExitStack() as stack:
        files: list[int] = []
        places: dict[str, tuple[int, int]] = {}
        for shard in plan.shards:
            path = folder / shard.file
            file = stack.enter_context(path.open("r+b" if path.is_file() else "w+b", buffering=0)).fileno()
            _write_at(file, memoryview(shard.header), 0)
            os.ftruncate(file, shard.nbytes)
            files.append(file)
            places |= {name: (file, offset) for name, offset in shard.offsets.items()}
        yield files, places


def _written(
    plan: ConversionPlan, chunks: list[Chunk], folder: Path, journal: Journal, verify: bool, supply: Supply
) -> dict[int, Done]:
    """The chunks of an earlier run, by number, compared with the source that they were read from, where that stays.

    Empty where a file is gone. OtherConversion when the source or the journal is another.
    """
    sizes = {folder / shard.file: shard.nbytes for shard in plan.shards}
    if not all(file.is_file() and file.stat().st_size == nbytes for file, nbytes in sizes.items()):
        journal.restart()
    for number, done in journal.done.items():
        if number >= len(chunks) or len(done.checksums) != (len(chunks[number].job.outputs) if verify else 0):
            raise damaged(folder, f"chunk {number} is none of this conversion's")
    there = {number: chunks[number] for number in journal.done}
    if supply.stays and there:
        with supply.held(supply.stretch(there)) as sources:
            results = _each(there.values(), lambda chunk: digest_of(chunk, sources), "comparing", supply)
            with closing(results):
                for (_, found), done in zip(results, journal.done.values(), strict=True):
                    if found != done.source:
                        raise differs(folder, "the source changed")
    return dict(journal.done)


def _write_weights(
    plan: ConversionPlan, chunks: list[Chunk], folder: Path, journal: Journal, verify: bool, supply: Supply
) -> dict[int, Done]:
    """Write the chunks that the journal does not have; returns all by number."""
    done = _written(plan, chunks, folder, journal, verify, supply)
    if done and supply.stays:
        tell(f"resuming: {len(done)} of {len(chunks)} chunks are there")
    for stretch in supply.stretches(chunks, done):
        with supply.held(stretch) as sources, _shards(plan, folder) as (files, places):
            carry_out = partial(_carry_out, plan=plan, sources=sources, places=places, verify=verify)
            with closing(_each(stretch.chunks.values(), carry_out, "writing", supply)) as results:
                for found in _noted(zip(stretch.chunks, results, strict=True), files, journal):
                    done.update(found)
    return done


def _noted(
    results: Iterable[tuple[int, tuple[Chunk, Done]]], files: list[int], journal: Journal
) -> Iterator[dict[int, Done]]:
    """Chunks by number, once their data is on the disk and the journal has them."""
    new: dict[int, Done] = {}
    read = 0

    def note() -> dict[int, Done]:
        for file in files:
            os.fsync(file)
        journal.append(new)
        return dict(new)

    for number, (chunk, done) in results:
        new[number] = done
        read += chunk.nbytes
        if read >= BATCH_BYTES:
            yield note()
            new.clear()
            read = 0
    yield note()


def _check_shards(
    plan: ConversionPlan, chunks: list[Chunk], folder: Path, done: Mapping[int, Done], supply: Supply
) -> None:
    """Read the output files again and compare them with the checksums of what was written."""
    ranges = {shard.file: [FileRange(0, len(shard.header), crc32(shard.header), "its header")] for shard in plan.shards}
    offsets = {name: (shard.file, offset) for shard in plan.shards for name, offset in shard.offsets.items()}
    for number, chunk in enumerate(chunks):
        for output, known in zip(chunk.job.outputs, done[number].checksums, strict=True):
            file, offset = offsets[output.name]
            row = output.nbytes // output.shape[0]
            start, nbytes = offset + chunk.start * row, (chunk.stop - chunk.start) * row
            ranges[file].append(FileRange(start, nbytes, known, output.name))
    with supply.bar("reading again", sum(shard.nbytes for shard in plan.shards)) as bar:
        for file, written in ranges.items():
            check_file(folder / file, written, bar.update)
