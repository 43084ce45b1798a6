"""The names of --tasks, and what they stand for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.checkpoint.hub import NANO
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.harness_tasks import find_task, is_of_harness
from mlx_qwen35.evaluate.image_sets import image_task
from mlx_qwen35.evaluate.kl import KL
from mlx_qwen35.evaluate.local import SUFFIXES, bundled, read_task
from mlx_qwen35.evaluate.task import Task
from mlx_qwen35.values import shown

# The list `quick`: questions of each, which together take an M1 a night, and tell scores to 3 to 5 points.
QUICK = {"mmlu_pro": 140, "ifeval": 100, "mmmu_val": 60}


@dataclass(frozen=True)
class Wanted:
    """A task that was asked for. task: None for kl. items: how many questions; None: all."""

    name: str
    task: Task | None
    items: int | None = None


def find(words: Sequence[str], items: int | None) -> list[Wanted]:
    """The tasks of --tasks, each once. InputError: task_unknown, task_invalid, package_missing."""
    found: dict[str, Wanted] = {}
    absent: list[InputError] = []
    for word in words:
        for name, count in QUICK.items() if word == "quick" else [(word, items)]:
            try:
                own = _find(name, count if items is None else min(items, count or items))
            except InputError as error:
                if error.code not in ("package_missing", "hub_failed"):
                    raise
                absent.append(error)
                continue
            _check_name(own)
            if own.name.casefold() in found:  # files of theirs would be one where a disk knows no capitals
                raise InputError("task_invalid", f"two tasks must not have one name; {own.name} is there twice")
            found[own.name.casefold()] = own
    if absent:  # all that is missing is told together
        advice = dict.fromkeys(advice for error in absent for advice in error.args[2:])
        code = "hub_failed" if any(error.code == "hub_failed" for error in absent) else "package_missing"
        raise InputError(code, "; ".join(error.fault for error in absent), ". ".join(advice))
    return [*found.values()]


def _check_name(found: Wanted) -> None:
    """InputError task_invalid for a name that no file of answers can have."""
    if not re.fullmatch(r"\w[\w.-]*", found.name, re.ASCII):
        raise InputError(
            "task_invalid",
            f"a task's name must be of letters, digits, '_', '-' and '.', got {shown(found.name)}",
        )
    if found.name == KL and found.task:
        raise InputError("task_invalid", f"a task must not have the name {KL}, which is a measurement of its own")


def _find(name: str, items: int | None) -> Wanted:
    if name == KL:
        return Wanted(KL, None, items)
    if name == NANO:
        return Wanted(NANO, bundled(), items)
    if name.endswith(SUFFIXES) and not is_of_harness(Path(name)):
        task = read_task(Path(name))
        return Wanted(task.name, task, items)
    if images := image_task(name):
        return Wanted(images.name, images, items)
    found = find_task(name)
    return Wanted(found.name, found, items)
