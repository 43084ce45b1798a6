"""The items of nano's tasks: the same for the same seed, held out from the training, as the chat template writes them,
no longer than a row of the training, and scored right by their own scorer alone."""

import json
import zlib
from functools import cache
from itertools import count
from pathlib import Path
from random import Random

import pytest
from encoding import Encoder
from ours import prompt
from scoring import fits, right, well_formed
from tasks import AGENT_TASKS, ALL_TASKS, TASKS, Item, draw, draw_lesson, is_held_out, items_of

from mlx_qwen35 import Processor, load

PROMPTS = json.loads((Path(__file__).parents[1] / "examples/nano/prompts.json").read_text())
ITEMS = 16
ROW = 352  # tokens of a row of the training (lessons.py, Settings.tokens)
LESSONS = 4252710246  # crc32 of lessons of the first tasks, as train.py and the tokenizer draw them
LATER = [*AGENT_TASKS, "needle"]
MODES = [(name, thinking) for name in LATER for thinking in ALL_TASKS[name].modes]


@cache
def drawn(task: str, thinking: bool) -> list[Item]:
    return items_of(task, thinking, ITEMS, 0)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load("nano")[1]


def test_prompts_are_those_of_their_seeds(encoder):
    for entry in PROMPTS:
        item = draw(entry["task"], Random(entry["seed"]), thinking=entry["thinking"])
        assert (encoder.text(item), item.completion, item.answer) == (
            entry["prompt"], entry["completion"], entry["answer"],
        )  # fmt: skip


def test_lessons_are_those_of_their_seeds(encoder):
    crc = 0
    for task in TASKS:
        for seed in range(8):
            rng = Random(seed)
            item, turns = draw_lesson(task, rng, more=3, easy=seed % 2 == 0)
            said = [encoder.text(item), item.completion, item.key, rng.random()]
            said += [part for turn in turns for part in (turn.question, turn.thought, turn.answer, turn.key)]
            crc = zlib.crc32(repr(said).encode(), crc)
    assert crc == LESSONS


@pytest.mark.parametrize(("task", "thinking"), MODES)
def test_a_seed_names_an_item(task, thinking):
    assert drawn(task, thinking) == items_of(task, thinking, ITEMS, 0)
    assert len({repr(item) for item in drawn(task, thinking)}) > ITEMS // 2


@pytest.mark.parametrize(("task", "thinking"), MODES)
def test_training_never_sees_a_held_out_item(encoder, task, thinking):
    trained = [draw(task, Random(seed), held_out=False, thinking=thinking) for seed in range(40)]
    assert all(is_held_out(item.key) for item in drawn(task, thinking) if item.key)
    assert not any(is_held_out(item.key) for item in trained)
    shared = {encoder.text(item) for item in trained} & {encoder.text(item) for item in drawn(task, thinking)}
    assert not shared or task == "no_call"  # greetings and the like are in both


def test_a_sum_that_is_held_out_is_so_behind_cut_thinking_too():
    keys = {task: {item.key.split(":")[0] for item in drawn(task, True)} for task in ("long_sum", "closed_sum")}
    assert keys["long_sum"] == keys["closed_sum"] == {"sum"}


@pytest.mark.parametrize(("task", "thinking"), MODES)
def test_an_item_is_a_row_as_the_checkpoint_writes_it(encoder, processor, task, thinking):
    for item in drawn(task, thinking):
        row = encoder.lesson(item, [])
        said = [token for token, learn in zip(row.ids, row.learn, strict=True) if learn]
        assert encoder.prompt(item).ids == list(prompt(processor, item).tokens)
        assert encoder.tokenizer.decode(said, skip_special_tokens=False) == f"{item.completion}<|im_end|>"
        assert len(said) <= ALL_TASKS[task].limit


@pytest.mark.parametrize(("task", "thinking"), MODES)
def test_the_longest_items_fit_a_row(encoder, task, thinking):
    def size(item: Item) -> int:
        return len(json.dumps((item.messages, item.tools, item.given, item.completion)))

    longest = sorted(items_of(task, thinking, 80, 1), key=size)[-2:]
    assert all(len(encoder.lesson(item, []).ids) <= ROW for item in longest)


@pytest.mark.parametrize("task", AGENT_TASKS)
def test_a_call_is_written_as_the_checkpoint_writes_it_back(processor, task):
    for item in drawn(task, True):
        calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in item.calls]
        said = {"role": "assistant", "content": "", "tool_calls": calls}
        messages = [{"role": "user", "content": "Go."}, said]
        back = processor.render(messages, tools=item.tools, add_generation_prompt=False)
        assert not calls or f"</think>\n\n{item.answer}<|im_end|>" in back


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "thinking"), MODES)
def test_the_answer_alone_scores(task, thinking):
    items = drawn(task, thinking)
    for item in items:
        assert right(item.completion, item) and well_formed(item.completion, item) is not False
        others = [other.completion for other in items if other.answer != item.answer]
        assert others and not any(right(text, item) for text in others)
        cut = item.completion.rpartition("</function>")[0] or item.completion[:-1]  # a call is whole at this tag
        assert not right(cut, item) and not right("", item)


def of(wanted: str, task: str) -> Item:
    items = (draw(task, Random(seed), thinking=False) for seed in count())
    return next(item for item in items if wanted in item.answer)


@pytest.mark.parametrize(
    ("task", "had", "put"),
    [
        ("typed_call", "True", "true"),
        ("typed_call", "True", "False"),
        ("typed_call", "True", "1"),
        ("typed_call", "set_heat", "set_alarm"),
        ("json_schema", "}", ', "more": 1}'),
    ],
)
def test_what_a_program_would_read_decides(task, had, put):
    item = of(had, task)
    assert right(item.completion.replace(had, put), item) == (put == "true")


def test_calls_count_in_order_and_all_of_them():
    item = next(item for item in drawn("several_calls", False) if len(item.calls) == 2)
    first, second = item.answer.split("\n<tool_call>\n")
    second = f"<tool_call>\n{second}"
    assert right(f"{first}\n{second}", item)
    assert not any(right(text, item) for text in (first, f"{second}\n{first}", f"{first}\n{second}\n{first}"))


def test_a_call_that_does_not_fit_its_tool_is_not_well_formed():
    item = of("set_light", "typed_call")
    assert not well_formed(item.answer.replace("set_light", "get_light"), item)
    assert not well_formed(item.answer.replace("<parameter=on>", "<parameter=off>"), item)
    assert not well_formed("The light is on.", item)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "enum": ["on"]}, "off"),
        ({"type": "integer"}, True),
        ({"type": "integer"}, 1.5),
        ({"type": "boolean"}, "true"),
        ({"type": "array", "items": {"type": "string"}}, ["a", 1]),
        ({"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}, {}),
        ({"type": "object", "properties": {}}, {"x": 1}),
    ],
)
def test_a_schema_is_checked(schema, value):
    assert not fits(value, schema)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_several_tools_are_offered_and_one_fits():
    for item in drawn("choose_tool", False):
        names = [tool["function"]["name"] for tool in item.tools]
        assert len(set(names)) == len(names) >= 2 and len(item.calls) == 1 and item.calls[0][0] in names


def test_arguments_are_of_every_type():
    items = drawn("typed_call", False) + drawn("typed_call", True)
    found = {type(value) for item in items for _, given in item.calls for value in given.values()}
    assert found >= {bool, int, float, str, dict, list}


def test_long_sums_think_up_to_200_tokens(encoder):
    lengths = [encoder.lesson(item, []).learn.count(True) for item in items_of("long_sum", True, 40, 0)]
    assert 150 < max(lengths) <= 210 and min(lengths) < 60


def test_an_answer_behind_cut_thinking_says_how_far_it_got():
    for item in drawn("closed_sum", True):
        said, closing = item.given
        numbers = [int(number) for number in item.key.removeprefix("sum:").split("+")]
        totals = [sum(numbers[:n]) for n in range(1, len(numbers) + 1)]
        assert closing == "\n\nThat is enough thinking. Now I give the answer.\n</think>\n\n"
        if item.answer.startswith("I got to "):
            got = totals.index(int(item.answer.removeprefix("I got to ").rstrip(".")))
            assert got == sum(f"={total}\n" in f"{said}\n" for total in totals[1:]) < len(numbers) - 1
        else:
            assert int(item.answer) == totals[-1] and said.endswith(f"={totals[-1]}")
