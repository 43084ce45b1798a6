"""What a run has saved, to go on from: OUT/run/ holds whole states, and the log of losses.

A state is one file, written under a hidden name, that tells damage (cache/session_file.py). It is all that a run needs
beside its data: parameters, the optimizer's moments, the step, which gives the order of rows, and the best parameters.
A log is written ahead of the state that it belongs to; what goes beyond the state is cut off when a run goes on.
"""

import errno
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import mlx.core as mx

from mlx_qwen35.cache.session_file import SessionFile, Stored
from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.folder import written
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.disk import held
from mlx_qwen35.options import spelled
from mlx_qwen35.train.optimizer import Moments
from mlx_qwen35.values import is_whole

RUN = "run"  # the folder within OUT
LOG, SECONDS, IMAGES = "log.jsonl", "seconds.jsonl", "images"
KEPT = 2  # states
_STATE = "step-{:08d}.safetensors"


class Best(NamedTuple):
    """The parameters with the lowest validation loss."""

    step: int
    loss: float
    parameters: Mapping[str, Pair]


@dataclass(frozen=True)
class RunState:
    """Where a run stands behind a step. Nothing in it changes: the next step makes another one.

    stale: validations since the best. seconds: of training, over all processes that had a part in it. peak: bytes of
    memory, of the one that took the most.
    """

    step: int
    parameters: Mapping[str, Pair]
    moments: Moments = field(default_factory=dict)
    best: Best | None = None
    stale: int = 0
    seconds: float = 0.0
    peak: int = 0

    @property
    def chosen(self) -> Mapping[str, Pair]:
        """The parameters that are the adapter: the best by validation, without validation the last."""
        return self.best.parameters if self.best else self.parameters


class StateFile(SessionFile):
    """The file of a state. A session's, but for its format."""

    format = "mlx_qwen35.training"


class RunFolder:
    """OUT/run, which belongs to this process within `held`."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out / RUN
        self.images = self.folder / IMAGES

    @property
    def states(self) -> list[Path]:
        """The saved states, the newest last."""
        return sorted(self.folder.glob(_STATE.replace("{:08d}", "[0-9]" * 8)))

    def check(self, resume: bool) -> bool:
        """Whether there is a state to go on from. InputError where OUT must not be written."""
        if self.out.exists() and not self.out.is_dir():
            raise InputError("target_refused", f"{spelled('adapter')} must name a folder; {self.out} is a file")
        there = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        if self.states:
            if not resume:
                raise InputError(
                    "target_refused",
                    f"{self.out} holds a training run, saved at step {_number(self.states[-1]):,}. Go on with it by "
                    f"{spelled('resume', True)}, or choose another folder",
                )
            return True
        begun = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        foreign = sorted(name for name in there - {RUN} | begun - {LOG, SECONDS, IMAGES} if not name.startswith("."))
        if foreign:
            raise InputError(
                "target_refused",
                f"{spelled('adapter')} must name a folder that is empty, absent or a training run's; {self.out} holds "
                f"{foreign[0]}. Choose another one",
            )
        return False

    def held(self) -> AbstractContextManager[None]:
        """The block alone trains into this folder, which is made. The lock ends with the process, however that ends."""
        return held(self.folder, self.out, "trains into")

    def save(self, state: RunState, identity: Mapping[str, Any]) -> None:
        """Write a state, and remove those before the last few. InputError: disk_full, output_unwritable."""
        arrays: dict[str, Stored] = dict(_flat("parameters", state.parameters))
        for name, parts in state.moments.items():
            for part, kinds in parts.items():
                arrays |= {f"moments|{name}|{part}|{kind}": array for kind, array in kinds.items()}
        best = state.best
        if best is not None and best.parameters is not state.parameters:
            arrays |= _flat("best", best.parameters)
        record = {
            "step": state.step, "stale": state.stale, "seconds": state.seconds, "peak": state.peak,
            "best": best and [best.step, best.loss], "identity": identity,
            "scales": {name: pair.scale for name, pair in state.parameters.items()},
        }  # fmt: skip
        file = StateFile(self.folder / _STATE.format(state.step))
        try:
            file.write({"run": json.dumps(record)}, arrays)
        finally:
            file.close()
        for old in self.states[:-KEPT]:
            old.unlink()

    def read(self, identity: Mapping[str, Any]) -> RunState:
        """The newest state. InputError run_invalid where it is damaged, resume_differs where it is of another run."""
        path = self.states[-1]
        file = StateFile(path)
        try:
            record = json.loads(file.header().metadata["run"])
            _check_same(record["identity"], identity, self.out)
            arrays = dict(file.arrays())
            return _state(record, arrays)
        except InputError as error:
            if error.code != "session_invalid":
                raise
            raise _damaged(path, error.fault) from error
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"it lacks {error}") from error
        finally:
            file.close()


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _flat(kind: str, parameters: Mapping[str, Pair]) -> dict[str, mx.array]:
    return {f"{kind}|{name}|{part}": array for name, pair in parameters.items()
            for part, array in (("a", pair.a), ("b", pair.b))}  # fmt: skip


def _state(record: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> RunState:
    scales: Mapping[str, float] = record["scales"]

    def pairs(kind: str) -> dict[str, Pair]:
        return {name: Pair(arrays[f"{kind}|{name}|a"], arrays[f"{kind}|{name}|b"], scale)
                for name, scale in scales.items()}  # fmt: skip

    moments: dict[str, Any] = {}
    for key, array in arrays.items():
        if key.startswith("moments|"):
            _, name, part, kind = key.split("|")
            moments.setdefault(name, {}).setdefault(part, {})[kind] = array
    parameters, best = pairs("parameters"), record["best"]
    if best is not None:
        own = any(key.startswith("best|") for key in arrays)
        best = Best(best[0], best[1], pairs("best") if own else parameters)
    told = {name: record[name] for name in ("stale", "seconds", "peak")}
    return RunState(record["step"], parameters, moments, best, **told)


def _damaged(path: Path, fault: str) -> InputError:
    return InputError(
        "run_invalid",
        f"{path} must be a state as it was saved, and was damaged or changed ({fault}). Remove it: the state before "
        "it, if there is one, is gone on from; else train into another folder",
    )


def _check_same(found: Mapping[str, Any], identity: Mapping[str, Any], out: Path) -> None:
    differ = [_difference(name, found.get(name), own) for name, own in identity.items() if found.get(name) != own]
    if differ:
        raise InputError(
            "resume_differs",
            f"{spelled('resume', True)} goes on with the same run only; since the one in {out} was begun, "
            f"{'; '.join(differ)}. Use what it was begun with, or train into another folder",
        )


def _difference(name: str, found: Any, own: Any) -> str:
    if not isinstance(own, dict) or not isinstance(found, dict):
        return f"{name} changed"
    changed = [key for key in {**found, **own} if found.get(key) != own.get(key)]
    if name == "options":
        return ", ".join(f"{spelled(key)} was {found.get(key)} and is {own.get(key)}" for key in changed)
    return f"{name} changed: {', '.join(changed)}"


class Lines:
    """A file of JSON lines, each of a step, open for the next ones.

    Of what is there it keeps the whole lines up to a step, in their order; a run goes on without those that are lost.

    InputError: disk_full, output_unwritable.
    """

    def __init__(self, path: Path, step: int):
        self.path, lines, last = path, [], -1
        found = path.read_bytes() if path.is_file() else b""
        for line in found.splitlines(keepends=True):
            own = _step_of(line)
            if own is not None and last < own <= step:
                lines.append(line)
                last = own
        kept = b"".join(lines)
        with written(str(path)):
            self._file = path.open("r+b" if path.is_file() else "w+b", buffering=0)
            if not found.startswith(kept):
                self._file.write(kept)
            self._file.truncate(len(kept))
            self._file.seek(0, os.SEEK_END)

    def append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        with written(str(self.path)):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "a line was cut")

    def flush(self) -> None:
        """Wait until all lines are on the disk."""
        with written(str(self.path)):
            os.fsync(self._file.fileno())

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _step_of(line: bytes) -> int | None:
    """The step of a line of a log; None where it is no whole one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if line.endswith(b"\n") and is_whole(step) else None
