"""The journal of a conversion: what is on disk for sure, line by line, in the folder that is being written.

The first line identifies the conversion. A line about data is written once the data is on disk, never before. The last
line is written when the folder takes its name, and names the folder that it replaces.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from mlx_qwen35.convert.plan import ConversionPlan
from mlx_qwen35.convert.verify import Difference
from mlx_qwen35.errors import InputError
from mlx_qwen35.values import is_number, is_whole

JOURNAL = ".conversion.jsonl"
_IDENTITY = ("source", "options", "programs")


class OtherConversion(InputError):
    """The journal belongs to another conversion, or cannot be read; the folder was not touched."""


@dataclass(frozen=True)
class Done:
    """A chunk that is written.

    source: a digest of what was read for it. checksums: CRC-32 of its parts. difference: its errors. Without
    verification both are empty.
    """

    source: str
    checksums: tuple[int, ...] = ()
    difference: Difference = field(default_factory=Difference)


def identity(plan: ConversionPlan, **options: Any) -> dict[str, str]:
    """The first line: digests of the source's tensors and configuration and of the options, and the programs' versions.

    An adapter counts as an option, by what it holds. Weights are compared as they were read, chunk by chunk, see Done.
    Paths and times of files do not count.
    """

    def digest(*values: Any) -> str:
        return hashlib.sha256(repr(values).encode()).hexdigest()[:16]

    stored = [job.source.stored for job in plan.jobs]
    tensors = [
        asdict(source) | {"parts": [(part.stored_name, part.dtype, part.shape) for part in source.parts]}
        for source in stored
    ]
    config = [found.path.read_bytes() for found in plan.sources if found.path.name == "config.json"]
    jobs = [(job.dtype, job.quantization, job.outputs, job.rounding) for job in plan.jobs]
    shards = [(shard.file, shard.header) for shard in plan.shards]
    statistics = sorted((name, hashlib.sha256(array.tobytes()).hexdigest()) for name, array in plan.statistics.items())
    if plan.adapter:
        options["adapter"] = sorted(plan.adapter.items())
    programs = [f"{name} {version(name)}" for name in ("mlx-qwen35", "mlx", "numpy")]
    return {
        "source": digest(tensors, config),
        "options": digest(jobs, shards, plan.config, plan.generation, statistics, sorted(options.items())),
        "programs": ", ".join(programs),
    }


class Journal:
    """The journal of a folder, open for the next lines.

    identity: of this conversion. done: the chunks that the folder's journal has, by number. unfit: the tensors that do
    not fit float16, with reasons; None before they are noted. Raises OtherConversion if the folder's journal is of
    another conversion, or holds what was never written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]):
        self.folder, self.identity = folder, dict(identity)
        file = folder / JOURNAL
        lines, nbytes = _read(file, identity) if file.is_file() else ([], 0)
        self.unfit: dict[str, str] | None = next((line["kept"] for line in lines if "kept" in line), None)
        self.done = {line["chunk"]: _done(line) for line in lines if "chunk" in line}
        self.stream = file.open("r+b" if file.is_file() else "w+b")
        self.stream.truncate(nbytes)  # a line that was cut off
        self.stream.seek(nbytes)
        if not lines:
            _write(self.stream, [self.identity])

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def note_unfit(self, unfit: dict[str, str]) -> None:
        """Note tensors that do not fit float16, Hugging Face name -> reason. OtherConversion if others are noted."""
        if self.unfit is None:
            self.unfit = unfit
            _write(self.stream, [{"kept": unfit}])
        if self.unfit != unfit:
            raise differs(self.folder, "the source changed")

    def restart(self) -> None:
        """Forget the chunks: their data is not there."""
        self.done = {}
        self.stream.seek(0)
        self.stream.truncate()
        _write(self.stream, [self.identity, {"kept": self.unfit}])

    def append(self, done: Mapping[int, Done]) -> None:
        """Note chunks whose data is on disk."""
        lines: list[dict[str, Any]] = []
        for number, chunk in done.items():
            measured = {"checksums": chunk.checksums, "difference": list(asdict(chunk.difference).values())}
            lines.append({"chunk": number, "source": chunk.source} | (measured if chunk.checksums else {}))
        _write(self.stream, lines)


def _write(stream: BinaryIO, lines: list[dict[str, Any]]) -> None:
    stream.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    stream.flush()
    os.fsync(stream.fileno())


def note_placing(folder: Path, replaced: list[int]) -> None:
    """Note, before a folder takes its name, the inode of the folder that it replaces; an empty list if none."""
    with (folder / JOURNAL).open("ab") as stream:
        _write(stream, [{"replaces": replaced}])


def replaces(folder: Path) -> list[int] | None:
    """The list that note_placing noted in a folder; None where it noted nothing."""
    file = folder / JOURNAL
    if file.is_symlink() or not file.is_file():
        return None
    *_, last, _ = [b"", *file.read_bytes().split(b"\n")]
    try:
        line = _line(last)
    except ValueError:
        return None
    return line.get("replaces")


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(file: Path, identity: Mapping[str, str]) -> tuple[list[dict[str, Any]], int]:
    """The whole lines, and their bytes. A killed process may leave a last line without its end.

    Further lines are read only if the first one says that the same programs wrote them.
    """
    *whole, _ = file.read_bytes().split(b"\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = _line(text)
            if (number == 1) != (line.keys() == set(_IDENTITY)):
                raise ValueError("the first line alone tells which conversion it is")
        except ValueError as error:
            raise damaged(file.parent, f"line {number}: {str(error)[:200]}") from error
        if number == 1:
            _check_same(line, identity, file.parent)
        lines.append(line)
    return lines, sum(len(text) + 1 for text in whole)


def _line(text: bytes) -> dict[str, Any]:
    """A line of one of _KINDS. ValueError for anything else."""
    try:
        line = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    kind = next((kind for kind in _KINDS if isinstance(line, dict) and line.keys() == kind.keys()), None)
    if kind is None:
        raise ValueError("it is none of the lines of a journal")
    if wrong := [name for name, is_right in kind.items() if not is_right(line[name])]:
        raise ValueError(f"{wrong[0]!r} cannot be {str(line[wrong[0]])[:50]}")
    return line


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_sums(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(is_number(n) and 0 <= n < math.inf for n in value)


def _are_reasons(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


_CHUNK = {"chunk": _is_count, "source": _is_text}
_KINDS: tuple[Mapping[str, Callable[[Any], bool]], ...] = (
    dict.fromkeys(_IDENTITY, _is_text), {"kept": _are_reasons}, {"replaces": _are_counts}, _CHUNK,
    _CHUNK | {"checksums": _are_counts, "difference": _are_sums},
)  # fmt: skip


def _done(line: Mapping[str, Any]) -> Done:
    return Done(line["source"], tuple(line.get("checksums", ())), Difference(*line.get("difference", ())))


def _check_same(found: Mapping[str, str], identity: Mapping[str, str], folder: Path) -> None:
    words = {"source": "the source changed", "options": "the options differ, of which an adapter is one"}
    words["programs"] = f"the versions differ ({found['programs'][:200]}; now {identity['programs']})"
    if other := [words[key] for key, value in identity.items() if found[key] != value]:
        raise differs(folder, " and ".join(other))


def differs(folder: Path, what: str) -> OtherConversion:
    return OtherConversion(
        "resume_differs",
        f"--resume goes on with the same conversion only; since the one in {folder} was broken off, {what}. Start "
        "again without --resume, or with what it was started with",
    )


def damaged(folder: Path, what: str) -> OtherConversion:
    return OtherConversion(
        "journal_damaged",
        f"--resume needs the journal as it was written; {folder / JOURNAL} was changed since ({what}). Start again "
        "without --resume",
    )
