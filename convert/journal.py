"""A conversion that was killed goes on: what is on disk for sure, line by line, in the folder that is being written.

The first line tells which conversion it is. A line about data is written once the data is on disk, never before. The
last one is written when the folder takes its name, and tells what it replaces.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from mlx_qwen35.convert.plan import Plan
from mlx_qwen35.convert.verify import Difference
from mlx_qwen35.errors import InputError

JOURNAL = ".conversion.jsonl"
_IDENTITY = ("source", "options", "programs")


class OtherConversion(InputError):
    """The journal belongs to another conversion, or cannot be read: nothing of it was touched."""


@dataclass(frozen=True)
class Done:
    """A chunk that is written.

    source: a digest of what was read for it. checksums: of its parts; difference: its errors; both only where the run
    verifies.
    """

    source: str
    checksums: tuple[int, ...] = ()
    difference: Difference = field(default_factory=Difference)


def identity(plan: Plan, **options: Any) -> dict[str, str]:
    """What must be the same for a conversion to go on: tensors and configuration of the source, options, programs.

    The weights are compared as they were read, chunk by chunk, see Done. Where files lie and how old they are does not
    count.
    """

    def digest(*values: Any) -> str:
        return hashlib.sha256(repr(values).encode()).hexdigest()[:16]

    tensors = [
        replace(job.source, parts=[(part.stored_name, part.dtype, part.shape) for part in job.source.parts])
        for job in plan.jobs
    ]
    config = [found.path.read_bytes() for found in plan.sources if found.path.name == "config.json"]
    jobs = [(job.dtype, job.quantization, job.outputs, job.rounding) for job in plan.jobs]
    shards = [(shard.file, shard.header) for shard in plan.shards]
    statistics = sorted((name, hashlib.sha256(array.tobytes()).hexdigest()) for name, array in plan.statistics.items())
    programs = [f"{name} {version(name)}" for name in ("mlx-qwen35", "mlx", "numpy")]
    return {
        "source": digest(tensors, config),
        "options": digest(jobs, shards, plan.config, plan.generation, statistics, sorted(options.items())),
        "programs": ", ".join(programs),
    }


class Journal:
    """The journal of a folder, open for the next lines.

    identity: of this conversion. If the folder has the journal of the same one, `done` holds its chunks by number.
    Raises OtherConversion if it is of another, or holds what was never written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]):
        self.folder, self.identity = folder, dict(identity)
        file = folder / JOURNAL
        lines, nbytes = _read(file, identity) if file.is_file() else ([], 0)
        self.kept: dict[str, str] | None = next((line["kept"] for line in lines if "kept" in line), None)
        self.done = {line["chunk"]: _done(line) for line in lines if "chunk" in line}
        self.stream = file.open("r+b" if file.is_file() else "w+b")
        self.stream.truncate(nbytes)  # a line that was cut off
        self.stream.seek(nbytes)
        if not lines:
            self._append([self.identity])

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def keep(self, kept: dict[str, str]) -> None:
        """Note the tensors that do not fit float16: Hugging Face name -> why. OtherConversion if others are noted."""
        if self.kept is None:
            self.kept = kept
            self._append([{"kept": kept}])
        if self.kept != kept:
            raise differs(self.folder, "the source changed")

    def restart(self) -> None:
        """Forget the chunks: their data is not there."""
        self.done = {}
        self.stream.seek(0)
        self.stream.truncate()
        self._append([self.identity] if self.kept is None else [self.identity, {"kept": self.kept}])

    def append(self, done: Mapping[int, Done]) -> None:
        """Note chunks whose data was brought to disk before."""
        lines = []
        for number, chunk in done.items():
            line = {"chunk": number, "source": chunk.source}
            if chunk.checksums:
                line |= {"checksums": chunk.checksums, "difference": list(asdict(chunk.difference).values())}
            lines.append(line)
        self._append(lines)

    def _append(self, lines: list[dict]) -> None:
        _write(self.stream, lines)


def _write(stream: BinaryIO, lines: list[dict]) -> None:
    stream.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    stream.flush()
    os.fsync(stream.fileno())


def note_placing(folder: Path, replaced: list[int]) -> None:
    """Note, before the folder takes its name, the inode of the folder that it replaces, if it replaces one."""
    with (folder / JOURNAL).open("ab") as stream:
        _write(stream, [{"replaces": replaced}])


def replaces(folder: Path) -> list[int] | None:
    """What note_placing noted in a folder; None where nothing is noted."""
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


def _read(file: Path, identity: Mapping[str, str]) -> tuple[list[dict], int]:
    """The whole lines, and their bytes. What a killed process leaves is a last line without its end.

    Lines are read once the first one tells that this very program wrote them.
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
    """A line of one of the kinds that are written. ValueError for anything else."""
    try:
        line = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(line, dict) or not any(line.keys() == kind.keys() for kind in _KINDS):
        raise ValueError("it is none of what is written there")
    kind = next(kind for kind in _KINDS if line.keys() == kind.keys())
    if wrong := [name for name, is_right in kind.items() if not is_right(line[name])]:
        raise ValueError(f"{wrong[0]!r} cannot be {str(line[wrong[0]])[:50]}")
    return line


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_sums(value: Any) -> bool:
    fit = isinstance(value, list) and len(value) == 3
    return fit and all(type(number) in (int, float) and 0 <= number < math.inf for number in value)


def _are_reasons(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


_CHUNK = {"chunk": _is_count, "source": _is_text}
_KINDS = (
    dict.fromkeys(_IDENTITY, _is_text), {"kept": _are_reasons}, {"replaces": _are_counts}, _CHUNK,
    _CHUNK | {"checksums": _are_counts, "difference": _are_sums},
)  # fmt: skip


def _done(line: Mapping[str, Any]) -> Done:
    return Done(line["source"], tuple(line.get("checksums", ())), Difference(*line.get("difference", ())))


def _check_same(found: Mapping[str, str], identity: Mapping[str, str], folder: Path) -> None:
    words = {"source": "the source changed", "options": "the options differ"}
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
