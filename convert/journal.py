"""A conversion that was killed goes on: what is on disk for sure, line by line, in the folder that is being written.

The first line tells which conversion it is. A line about data is written once the data is on disk, never before.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_qwen35.convert.plan import Plan
from mlx_qwen35.convert.verify import Difference
from mlx_qwen35.errors import InputError

JOURNAL = ".conversion.jsonl"


class OtherConversion(InputError):
    """The journal belongs to another conversion: nothing of it was touched."""


@dataclass(frozen=True)
class Done:
    """A chunk that is written: the checksums of its parts and its errors, both only where the run verifies."""

    checksums: tuple[int, ...] = ()
    difference: Difference = field(default_factory=Difference)


def identity(plan: Plan, **options: Any) -> dict[str, str]:
    """What must be the same for a conversion to go on: the source's files, the options, and the programs."""

    def digest(values: Any) -> str:
        return hashlib.sha256(repr(values).encode()).hexdigest()[:16]

    statistics = sorted((name, hashlib.sha256(array.tobytes()).hexdigest()) for name, array in plan.statistics.items())
    shards = [(shard.file, shard.header) for shard in plan.shards]
    chosen = [plan.jobs, shards, plan.config, plan.generation, statistics, sorted(options.items())]
    programs = [f"{name} {version(name)}" for name in ("mlx-qwen35", "mlx", "numpy")]
    return {
        "source": digest(plan.sources),
        "options": digest(chosen),
        "programs": ", ".join(programs),
    }


class Journal:
    """The journal of a folder, open for the next lines.

    identity: of this conversion. If the folder has the journal of the same one, `done` holds its chunks by number and
    `kept` the tensors that do not fit float16, None when that was not found out. Raises OtherConversion if it is of
    another.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]):
        self.file = folder / JOURNAL
        lines, nbytes = _read(self.file) if self.file.is_file() else ([], 0)
        if lines:
            _check_same(lines[0], identity, folder)
        self.kept: dict[str, str] | None = next((line["kept"] for line in lines if "kept" in line), None)
        self.done = {line["chunk"]: _done(line) for line in lines if "chunk" in line}
        self.stream = self.file.open("r+b" if self.file.is_file() else "w+b")
        self.stream.truncate(nbytes)  # a line that was cut off
        self.stream.seek(nbytes)
        if not lines:
            self._append([dict(identity)])

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def keep(self, kept: dict[str, str]) -> None:
        self.kept = kept
        self._append([{"kept": kept}])

    def append(self, done: Mapping[int, Done]) -> None:
        """Note chunks whose data was brought to disk before."""
        lines = []
        for number, chunk in done.items():
            line = {"chunk": number}
            if chunk.checksums:
                line |= {"checksums": chunk.checksums, "difference": list(asdict(chunk.difference).values())}
            lines.append(line)
        self._append(lines)

    def _append(self, lines: list[dict]) -> None:
        self.stream.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.stream.flush()
        os.fsync(self.stream.fileno())


def _read(file: Path) -> tuple[list[dict], int]:
    """The whole lines, and their bytes; what follows a line that cannot be read counts as not written."""
    lines, nbytes = [], 0
    for text in file.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
        nbytes += len(text)
    return lines, nbytes


def _check_same(found: Mapping[str, str], identity: Mapping[str, str], folder: Path) -> None:
    words = {"source": "the source changed", "options": "the options differ"}
    words["programs"] = f"the versions differ ({found.get('programs')}; now {identity['programs']})"
    if other := [words[key] for key, value in identity.items() if found.get(key) != value]:
        raise OtherConversion(
            "resume_differs",
            f"--resume goes on with the same conversion only; since the one in {folder} was broken off, "
            f"{' and '.join(other)}. Start again without --resume, or with what it was started with",
        )


def _done(line: Mapping[str, Any]) -> Done:
    return Done(tuple(line["checksums"]), Difference(*line["difference"])) if "checksums" in line else Done()
