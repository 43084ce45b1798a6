"""What a run has saved in DIR, to go on from: run.json says which run it is, TASK.jsonl has a line for each answer.

A line is on the disk before the next one is written. Lines stand in the order in which answers came; once a task is
whole they stand in the order of its questions, so that a run that was killed ends with the same file as one that was
not. Seconds are the machine's affair, and stand apart, in .seconds.jsonl.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.folder import write_whole, written
from mlx_qwen35.console.streams import read_file
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.disk import held
from mlx_qwen35.options import spelled
from mlx_qwen35.values import shown

Line = Mapping[str, Any]  # an answered question: "key", and what came of it
RUN, SECONDS, SUMMARY = "run.json", ".seconds.jsonl", "summary.json"


class Lines:
    """A file of JSON lines, which only grows. A last line that is half written is dropped.

    Raises InputError: run_invalid where another line is damaged; disk_full, output_unwritable.
    """

    def __init__(self, path: Path):
        self.path, self.read = path, []
        content = path.read_bytes() if path.is_file() else b""
        *whole, _ = content.split(b"\n")
        kept = 0
        for number, text in enumerate(whole, start=1):
            try:
                self.read.append(dict(json.loads(text)))
            except (ValueError, TypeError) as error:
                if number == len(whole):
                    break
                raise InputError(
                    "run_invalid",
                    f"{path} must hold a JSON object a line, and was changed: line {number} has none ({error}). Put it "
                    "back, or take another folder",
                ) from error
            kept += len(text) + 1
        self._end = kept

    def append(self, line: Line) -> None:
        """Write a line, and wait until it is on the disk."""
        text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with written(str(self.path)), self.path.open("r+b" if self.path.is_file() else "w+b") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(text)
        self.read.append(dict(line))


class ItemLog:
    """The answers to a task's questions, by key."""

    def __init__(self, folder: Path, task: str, seconds: Lines):
        self.task, self.path = task, folder / f"{task}.jsonl"
        self._lines, self._seconds = Lines(self.path), seconds
        try:
            self.lines: dict[str, Line] = {line["key"]: line for line in self._lines.read}
        except KeyError as error:
            raise InputError(
                "run_invalid", f"{self.path} must have {error} in each line, and was changed. Take another folder"
            ) from error

    def __contains__(self, key: str) -> bool:
        return key in self.lines

    @property
    def seconds(self) -> float:
        """Of all processes that had a part in the task."""
        return sum(line["seconds"] for line in self._seconds.read if line["task"] == self.task)

    def append(self, line: Line, seconds: float = 0.0) -> None:
        """Keep an answer. seconds: that passed since the one before it."""
        self._seconds.append({"task": self.task, "key": line["key"], "seconds": round(seconds, 3)})
        self._lines.append(line)
        self.lines[line["key"]] = line

    def arrange(self, keys: Sequence[str], judged: Mapping[str, Line] | None = None) -> list[Line]:
        """The lines of these questions, in this order, which the file has from now on; others stand behind them.

        judged: by key, what joins the lines of questions that were judged since they were answered.
        """
        for key, more in (judged or {}).items():
            self.lines[key] = {**self.lines[key], **more}
        wanted = dict.fromkeys(keys)
        ordered = [self.lines[key] for key in [*wanted, *(key for key in self.lines if key not in wanted)]]
        if ordered != self._lines.read:
            write_whole(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered))
            self._lines = Lines(self.path)
        return [self.lines[key] for key in keys]


class RunFolder:
    """DIR, which belongs to this process within `held`. A run with --against has a second one within the first."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def _seconds(self) -> Lines:
        return Lines(self.folder / SECONDS)

    def held(self) -> AbstractContextManager[None]:
        return held(self.folder, self.folder, "evaluates into")

    def check(self) -> None:
        """InputError target_refused where the folder is none, or holds something else than a run."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError("target_refused", f"{spelled('out')} must name a folder; {self.folder} is a file")
        there = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        foreign = [name for name in there if not name.startswith(".")]
        if foreign and RUN not in there:
            raise InputError(
                "target_refused",
                f"{spelled('out')} must name a folder that is empty, absent or an evaluation's; {self.folder} holds "
                f"{foreign[0]}. Choose another one",
            )

    def claim(self, identity: Mapping[str, Any], tasks: Mapping[str, str]) -> None:
        """Go on with the run that the folder holds, or begin it. One without an answer yet is begun anew.

        identity: what must be the same for that. tasks: name -> version; those that are new are added.

        Raises InputError: resume_differs, which says what differs; run_invalid.
        """
        path, own = self.folder / RUN, {**identity, "tasks": dict(tasks)}
        found = self.begun(identity, tasks)
        if found:
            own["tasks"] = found["tasks"] | own["tasks"]
        if own != found:
            write_whole(path, json.dumps(own, indent=2, ensure_ascii=False) + "\n")

    @property
    def has_answers(self) -> bool:
        return (self.folder / RUN).is_file() and any(self.folder.glob("*.jsonl"))

    def begun(self, identity: Mapping[str, Any], tasks: Mapping[str, str]) -> dict[str, Any] | None:
        """What the run was begun with that the folder holds, None where it has no answer yet. Errors: see `claim`."""
        self.check()
        path, own = self.folder / RUN, {**identity, "tasks": dict(tasks)}
        if self.has_answers:
            try:
                found = dict(json.loads(read_file(RUN, path)))
                before = dict(found["tasks"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    "run_invalid", f"{path} must hold what it was begun with, and was changed ({error}). Take another "
                    "folder",
                ) from error  # fmt: skip
            known = {**found, "tasks": {name: before[name] for name in tasks if name in before}}
            asked = {**own, "tasks": {name: tasks[name] for name in known["tasks"]}}
            if differ := list(differences(known, asked)):
                raise InputError(
                    "resume_differs",
                    f"{spelled('out')} goes on with the same run only; since the one in {self.folder} was begun, "
                    f"{'; '.join(differ)}. Give what it was begun with, or another folder",
                )
            return found
        return None

    def log(self, task: str) -> ItemLog:
        return ItemLog(self.folder, task, self._seconds)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def differences(found: Mapping[str, Any], own: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What differs between two records of a run, as "--temp was 1 and is 0"."""
    for name in {**found, **own}:
        before, now = found.get(name), own.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, name)
        elif before != now:
            what = {"settings": spelled(name), "tasks": f"the task {name}", "": name}.get(where, f"{where} {name}")
            was, is_now = ("not given" if value is None else shown(value) for value in (before, now))
            yield f"{what} was {was} and is {is_now}"
