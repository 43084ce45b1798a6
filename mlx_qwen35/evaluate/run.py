"""A task's questions through a model, into the log; what was answered before is not asked again."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.asking import Asker, Question, seed_of
from mlx_qwen35.evaluate.items import ItemLog, Line
from mlx_qwen35.evaluate.task import Asked, Item, Task

Progress = Callable[[int, int], object]  # called with the questions done and all of them
Judge = Callable[[str, str], float | None]  # key and answer -> score; None: it is judged elsewhere


def chosen(items: Sequence[Item], count: int | None) -> list[Item]:
    """`count` of a task's questions, evenly spread; None: all of them."""
    if count is None or count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def ask(
    asker: Asker,
    log: ItemLog,
    questions: Mapping[str, Callable[[], Asked]],
    judge: Judge,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> list[Line]:
    """Ask what the log does not have yet; the lines of all questions, in their order.

    questions: key -> what makes it, which is called when its turn comes. judge: gives the score of a line. seed: of the
    run; each question has one of its own by task and key.
    """
    done, since = sum(key in log for key in questions), time.monotonic()
    progress(done, len(questions))
    left = (
        Question(key, seed_of(log.task, key, seed), make()) for key, make in questions.items() if key not in log
    )
    for line in asker.answers(left):
        now = time.monotonic()
        log.append({**line, "score": judge(line["key"], line["answer"])}, now - since)
        done, since = done + 1, now
        progress(done, len(questions))
    return log.arrange([*questions])


def run(
    task: Task, asker: Asker, log: ItemLog, seed: int, items: int | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Line]:  # fmt: skip
    """The lines of a task's questions. items: how many; None: all."""
    some = {item.key: item for item in chosen(keyed(task), items)}

    def question(item: Item) -> Callable[[], Asked]:
        return lambda: task.ask(item)

    def judge(key: str, answer: str) -> float:
        return float(task.judge(some[key], answer))

    return ask(asker, log, {key: question(item) for key, item in some.items()}, judge, seed, progress)


def keyed(task: Task) -> Sequence[Item]:
    """All questions of a task. InputError task_invalid where there are none, or two have one key."""
    items, seen = task.items(), set[str]()
    if not items:
        raise InputError("task_invalid", f"a task must have questions; {task.name} has none")
    for item in items:
        if item.key in seen:
            raise InputError(
                "task_invalid", f"each question of a task must have a key of its own; {task.name} has {item.key!r} "
                "twice",
            )  # fmt: skip
        seen.add(item.key)
    return items


def settings_of(asker: Asker, asked: Asked) -> dict[str, Any]:
    """The options that a question was asked with, for a summary."""
    return {name: value for name, value in asker.options(asked).items() if name not in ("images", "videos", "pdfs")}
