"""A task's questions through a model, into the log; what was answered before is not asked again."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.asking import Asker, Question, seed_of
from mlx_qwen35.evaluate.items import ItemLog, Line
from mlx_qwen35.evaluate.task import TOO_LONG, Asked, Item, Task

T = TypeVar("T")
Progress = Callable[[int, int], object]  # called with the questions done and all of them
Judge = Callable[[str, str], Mapping[str, Any]]  # key and answer -> score and what is expected, which its line gets
EXPECTED = 400  # characters of what is expected


def chosen(items: Sequence[T], count: int | None) -> list[T]:
    """`count` of some questions, evenly spread; None: all of them."""
    if count is None or count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def ask(
    asker: Callable[[], Asker],
    log: ItemLog,
    questions: Mapping[str, Callable[[], Asked]],
    judge: Judge,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> list[Line]:
    """Ask what the log does not have yet; the lines of all questions, in their order.

    asker: gives the model, and is not called where nothing is left to ask. questions: key -> what makes it, which is
    called when its turn comes. judge: what it gives joins the line of an answer. seed: of the run;
    each question has one of its own by task and key.
    """
    left = [key for key in questions if key not in log]
    done = len(questions) - len(left)
    if left:
        ready = asker()
        progress(done, len(questions))
        since = time.monotonic()
        for line in ready.answers(Question(key, seed_of(log.task, key, seed), questions[key]()) for key in left):
            now = time.monotonic()
            judged = judge(line["key"], line["answer"])
            if line["finish_reason"] == TOO_LONG:
                judged = {**judged, "score": 0.0}
            log.append({**line, **judged}, now - since)
            done, since = done + 1, now
            progress(done, len(questions))
    return log.arrange([*questions])


def brief(right: str | Sequence[str]) -> str:
    """What is expected as one text, with its beginning where it is long; " | " is between several."""
    whole = right if isinstance(right, str) else " | ".join(right)
    return whole if len(whole) <= EXPECTED else f"{whole[:EXPECTED]}…"


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
