"""The names of --tasks, and what they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.checkpoint.hub import NANO
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.harness import find_task, is_of_harness
from mlx_qwen35.evaluate.image_sets import image_task
from mlx_qwen35.evaluate.kl import KL
from mlx_qwen35.evaluate.local import SUFFIXES, bundled, read_task
from mlx_qwen35.evaluate.task import Task

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
    for word in words:
        for name, count in QUICK.items() if word == "quick" else [(word, items)]:
            own = _find(name, count if items is None else min(items, count or items))
            if own.name in found:
                raise InputError("task_invalid", f"two tasks must not have one name; {own.name} is there twice")
            found[own.name] = own
    return [*found.values()]


def _find(name: str, items: int | None) -> Wanted:
    if name == KL:
        return Wanted(KL, None, items)
    if name == NANO:
        return Wanted(NANO, bundled(), items)
    if name.endswith(SUFFIXES) and not is_of_harness(Path(name)):
        task = read_task(Path(name))
        if task.name == KL:
            raise InputError("task_invalid", f"{name}: task must not be {KL}, which is a measurement of its own")
        return Wanted(task.name, task, items)
    if images := image_task(name):
        return Wanted(images.name, images, items)
    found = find_task(name)
    return Wanted(found.name, found, items)
