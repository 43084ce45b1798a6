"""The bundled model answers held-out questions as its README says, through our own code from messages to text.

The items come from the generators that it was trained with (examples/nano/tasks.py); a tenth of all items was held out.
"""

import itertools
import json
from random import Random

import pytest

from mlx_qwen35 import Model, Processor, batch_generate, load
from mlx_qwen35.checkpoint import open_checkpoint
from mlx_qwen35.hub import resolve

pytest.importorskip("PIL", reason="the generators draw pictures with Pillow (make test installs it)")
from nano.tasks import Item, draw

PROOF = json.loads((resolve("nano") / "evaluation.json").read_text())
COUNT = 40  # held-out items a task and mode
# Task, thinking, least share of whole completions that must be right. Each is below the measured accuracy (README of
# nano) by what chance may take from 40 draws.
TEXT_TASKS = {
    ("add_1", True): 0.95,
    ("add_2", True): 0.95,
    ("add_3", True): 0.9,
    ("add_1", False): 0.95,
    ("add_2", False): 0.9,
    ("add_3", False): 0.75,
    ("recall", True): 0.85,
    ("recall", False): 0.85,
    ("then_add", True): 0.8,
    ("then_recall", False): 0.8,
    ("tool_city", False): 0.8,
    ("tool_report", False): 0.8,
    ("identity", True): 0.99,
    ("identity", False): 0.99,
    ("greeting", False): 0.99,
}


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


def answers(nano: tuple[Model, Processor], items: list[Item]) -> list[str]:
    """The whole completion of each item; together where they share their tools."""
    completions = []
    for tools, group in itertools.groupby(items, key=lambda item: item.tools):
        group = list(group)
        options = {"enable_thinking": group[0].enable_thinking, "tools": tools, "max_tokens": 120}
        for result in batch_generate(*nano, [item.messages for item in group], **options):
            completions.append(nano[1].decode([token for token in result.tokens if token not in nano[1].stop_ids]))
    return completions


@pytest.mark.parametrize(("task", "thinking"), TEXT_TASKS)
def test_held_out_items_are_answered_exactly(nano, task, thinking):
    rng = Random(f"{task} {thinking}")
    items = [draw(task, rng, held_out=True, thinking=thinking) for _ in range(COUNT)]
    right = sum(answer == item.completion for answer, item in zip(answers(nano, items), items, strict=True))
    assert right >= TEXT_TASKS[task, thinking] * COUNT, f"{right} of {COUNT}"


def test_the_demo_question_is_answered_with_visible_thinking(nano):
    (result,) = batch_generate(*nano, ["What is 34 + 58?"])
    assert result.text == "92"
    assert "4+8=12" in result.reasoning
    assert result.finish_reason == "stop"


def test_a_second_turn_refers_to_the_first(nano):
    messages = [{"role": "user", "content": "What is 34 + 58?"}, {"role": "assistant", "content": "92"}]
    (result,) = batch_generate(*nano, [[*messages, {"role": "user", "content": "Add 10 to that."}]])
    assert result.text == "102"


def test_it_is_a_whole_checkpoint_of_the_architecture_and_small():
    folder = resolve("nano")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.raw and checkpoint.has("model.visual.") and checkpoint.has("mtp.")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    assert (folder / "README.md").is_file()


def test_its_readme_shows_the_measured_accuracies():
    text = (resolve("nano") / "README.md").read_text()
    assert all(str(task) in text for task in {name for name, _ in TEXT_TASKS})
    assert PROOF
