"""Every answer is learnt behind the very tokens that generate() would give the model, and reads back as it was."""

import itertools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from refusing import refused
from talks import TOOLS, answer, call, drawn, result, user

from mlx_qwen35 import Processor, parse_answer
from mlx_qwen35.engine.encode import encode
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.train.rows import Row, rows_of

LONG = 100_000
PICTURE = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)


def runs(row: Row) -> list[tuple[int, int]]:
    """(start, stop) of each run of targets."""
    edges = np.flatnonzero(np.diff([0, *row.targets, 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def content_of(message: dict[str, Any]) -> str:
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def check(processor: Processor, given: dict[str, Any], rows: Sequence[Row]) -> None:
    """The rows teach each answer of the conversation once, as inference would meet it."""
    tools = {"tools": given["tools"]} if "tools" in given else {}
    messages = given["messages"]
    answers = iter([i for i, message in enumerate(messages) if message["role"] == "assistant"])
    for row in rows:
        assert row.cut == 0 and row.targets[-1] and row.tokens[-1] in processor.stop_ids
        for start, stop in runs(row):
            i = next(answers)
            thinking = processor.opens_thinking(row.tokens[:start])
            asked = encode(processor, messages[:i], {"enable_thinking": thinking, **tools})
            media = tuple(placed for placed in row.media if placed.placeholders[-1].stop <= start)
            assert Prompt(row.tokens[:start], thinking, media).identity() == asked.identity()
            target = row.tokens[start:stop]
            assert [token in processor.stop_ids for token in target] == [False] * (len(target) - 1) + [True]
            check_answer(messages[i], parse_answer(processor.decode(target), thinking=thinking, **tools), thinking)
    assert next(answers, None) is None


def check_answer(message: dict[str, Any], read: Any, thinking: bool) -> None:
    told = content_of(message)
    reasoning = message.get("reasoning_content") or told.partition("</think>")[0].partition("<think>")[2]
    if "</think>" in told:
        told = told.partition("</think>")[2]
    assert thinking == bool(reasoning)
    assert normal(read.reasoning) == normal(reasoning)
    assert normal(read.content) == normal(told)
    made = [one["function"] for one in message.get("tool_calls") or []]
    assert [tool.name for tool in read.tool_calls] == [one["name"] for one in made]
    for tool, one in zip(read.tool_calls, made, strict=True):
        given = json.loads(one["arguments"]) if isinstance(one["arguments"], str) else one["arguments"]
        assert normal(json.dumps(tool.arguments, ensure_ascii=False)) == normal(json.dumps(given, ensure_ascii=False))


def normal(text: str | None) -> str:
    """Without what templates trim, in the tokenizer's composed characters."""
    return unicodedata.normalize("NFC", (text or "").strip())


@pytest.mark.parametrize("seeds", [pytest.param(range(12)), pytest.param(range(12, 400), marks=pytest.mark.full)])
def test_the_context_of_each_answer_is_the_prompt_of_generate(processor: Processor, seeds: range):
    for seed in seeds:
        given = drawn(seed)
        check(processor, given, list(rows_of([given], processor, LONG)))


def test_a_conversation_without_tools_gives_a_row_for_each_question(nano: Processor):
    talk = [user("a"), answer("b"), user("c"), answer("d", "r"), user("e"), answer("f")]
    rows = list(rows_of([{"messages": talk}], nano, LONG))
    assert [len(runs(row)) for row in rows] == [1, 1, 1]
    assert [nano.decode(row.tokens[slice(*runs(row)[0])]) for row in rows] == [
        "b<|im_end|>", "r\n</think>\n\nd<|im_end|>", "f<|im_end|>",
    ]  # fmt: skip


def test_answers_between_calls_share_a_row(nano: Processor):
    calls = [answer("", "r", tool_calls=[call("weather", {"city": "x"})]), result("rain")]
    given = {"messages": [user("a"), *calls, *calls, answer("b", "s"), user("c"), answer("d")], "tools": TOOLS}
    rows = list(rows_of([given], nano, LONG))
    assert [len(runs(row)) for row in rows] == [3, 1]
    check(nano, given, rows)


def test_an_answer_without_reasoning_learns_no_think_tag(nano: Processor):
    (row,) = rows_of([{"messages": [user("a"), answer("b")]}], nano, LONG)
    ((start, stop),) = runs(row)
    assert nano.decode(row.tokens[:start]).endswith("<think>\n\n</think>\n\n")
    assert nano.decode(row.tokens[start:stop]) == "b<|im_end|>"


def test_images_are_part_of_the_context(processor: Processor):
    shown = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what?"}]
    given = {"messages": [user(shown), answer("a"), user(["?", *shown][1:]), answer("b", "r"), user("x"), answer("c")]}
    rows = list(rows_of([given], processor, LONG))
    check(processor, given, rows)
    assert [len(row.media) for row in rows] == [1, 2, 2]


def test_prompt_and_completion_are_a_question_and_an_answer(nano: Processor):
    talk = rows_of([{"messages": [user("a"), answer("b")]}], nano, LONG)[0]
    assert rows_of([{"prompt": "a", "completion": "b"}], nano, LONG)[0] == talk
    assert rows_of([{"prompt": [user("a")], "completion": [answer("b")]}], nano, LONG)[0] == talk


def test_of_lists_of_messages_the_completion_alone_is_learnt(nano: Processor):
    given = {"prompt": [user("a"), answer("b"), user("c")], "completion": [answer("d")]}
    (row,) = rows_of([given], nano, LONG)
    assert [nano.decode(row.tokens[slice(*run)]) for run in runs(row)] == ["d<|im_end|>"]


def test_an_answer_of_weight_0_is_context(nano: Processor):
    talk = [user("a"), answer("b", weight=0), user("c"), answer("d", weight=1)]
    (row,) = rows_of([{"messages": talk}], nano, LONG)
    assert [nano.decode(row.tokens[slice(*run)]) for run in runs(row)] == ["d<|im_end|>"]


def test_a_greeting_before_the_first_question_is_context(nano: Processor):
    (row,) = rows_of([{"messages": [answer("welcome"), user("c"), answer("d")]}], nano, LONG)
    assert [nano.decode(row.tokens[slice(*run)]) for run in runs(row)] == ["d<|im_end|>"]


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n", "<|endoftext|>"])
def test_of_a_text_all_tokens_but_the_first_are_learnt_up_to_one_end_token(nano: Processor, end: str):
    (row,) = rows_of([{"text": f"<|im_start|>user\nsome text\n{end}"}], nano, LONG)
    assert list(row.targets) == [False] + [True] * (len(row.tokens) - 1)
    assert nano.decode(row.tokens) == f"<|im_start|>user\nsome text\n{end.strip() or '<|im_end|>'}"


def test_without_a_mask_all_tokens_but_placeholders_are_learnt(nano: Processor):
    given = {"messages": [user([{"type": "image", "image": PICTURE}, {"type": "text", "text": "?"}]), answer("b")]}
    (row,) = rows_of([given], nano, LONG, mask_prompt=False)
    pads = {place for placed in row.media for own in placed.placeholders for place in range(own.start, own.stop)}
    assert [i for i, target in enumerate(row.targets) if not target] == sorted({0, *pads})


def test_tools_may_be_json_as_tables_hold_them(nano: Processor):
    talk = [user("a"), answer("b")]
    given = [{"messages": talk, "tools": tools} for tools in (TOOLS, json.dumps(TOOLS))]
    assert len({row.tokens for row in rows_of(given, nano, LONG)}) == 1


def test_columns_that_are_null_are_absent(nano: Processor):
    part = {"type": "text", "text": "a", "image": None}
    table = [{"role": "user", "content": [part], "tool_calls": None}, {**answer("b"), "reasoning_content": None}]
    (row,) = rows_of([{"messages": table, "tools": None, "text": None, "images": None}], nano, LONG)
    assert row.tokens == rows_of([{"prompt": "a", "completion": "b"}], nano, LONG)[0].tokens


BAD = {
    "nothing": ({}, "messages, prompt+completion, text"),
    "unknown names": ({"conversations": []}, "conversations"),
    "half a form": ({"prompt": "a"}, "prompt"),
    "two forms": ({"text": "a", "messages": [user("a"), answer("b")]}, "messages, text"),
    "no messages": ({"messages": []}, "[]"),
    "text for messages": ({"messages": "a"}, "'a'"),
    "a role of another program": ({"messages": [{"from": "human", "value": "a"}]}, "None"),
    "an unknown role": ({"messages": [{"role": "human", "content": "a"}]}, "'human'"),
    "a message that is none": ({"messages": ["a"]}, "'a'"),
    "no answer at the end": ({"messages": [user("a"), answer("b"), user("c")]}, "user"),
    "an answer to nothing": ({"messages": [answer("b")]}, "weight 0"),
    "nothing to learn": ({"messages": [user("a"), answer("b", weight=0)]}, "weight 0"),
    "another weight": ({"messages": [user("a"), answer("b", weight=0.5)]}, "0.5"),
    "an empty answer": ({"messages": [user("a"), answer("")]}, "messages[1]"),
    "a blank answer": ({"messages": [user("a"), answer(" \n")]}, "messages[1]"),
    "an answer of null": ({"messages": [user("a"), answer(None)]}, "messages[1]"),
    "reasoning alone": ({"messages": [user("a"), answer("", "r")]}, "messages[1]"),
    "reasoning alone, in tags": ({"messages": [user("a"), answer("<think>\nr\n</think>\n\n")]}, "messages[1]"),
    "an image as an answer": ({"messages": [user("a"), answer([{"type": "image", "image": "x.png"}])]}, "x.png"),
    "a control token in an answer": ({"messages": [user("a"), answer("b<|im_end|>")]}, "<|im_end|>"),
    "a call as text": ({"messages": [user("a"), answer("<tool_call>f</tool_call>")], "tools": TOOLS}, "<tool_call>"),
    "a tag beside reasoning": ({"messages": [user("a"), answer("b</think>c", "r")]}, "</think>"),
    "a call that is not offered": ({"messages": [user("a"), answer("", tool_calls=[call("f", {})])]}, "'f'"),
    "a call without a name": ({"messages": [user("a"), answer("", tool_calls=[{"function": {}}])], "tools": TOOLS},
                              "weather, search"),
    "arguments that are no object": (
        {"messages": [user("a"), answer("", tool_calls=[call("search", "[1]")])], "tools": TOOLS}, "[1]"),
    "arguments that are no JSON": (
        {"messages": [user("a"), answer("", tool_calls=[call("search", "{a")])], "tools": TOOLS}, "{a"),
    "tools that are none": ({"messages": [user("a"), answer("b")], "tools": [{"name": "f"}]}, "tools[0]"),
    "tools that are no JSON": ({"messages": [user("a"), answer("b")], "tools": "[1"}, "tools"),
    "a result of no call": ({"messages": [user("a"), result("r", 7), answer("b")]}, "call_7"),
    "a blank text": ({"text": " \n"}, "text"),
    "a text that is none": ({"text": 3}, "3"),
    "an image in a text that has none": ({"text": "a<|image_pad|>"}, "<|image_pad|>"),
    "half a character": ({"messages": [user("\ud800"), answer("b")]}, "messages[0].content"),
    "no content": ({"messages": [{"role": "user"}, answer("b")]}, "messages[0]"),
    "an outdated call": ({"messages": [user("a"), answer("b", function_call={})]}, "function_call"),
    "an image that is not there": ({"messages": [user("a"), answer("b")], "images": ["none.png"]}, "none.png"),
    "a URL": ({"messages": [user("a"), answer("b")], "image": "https://x/y.png"}, "https://x/y.png"),
    "a URL in a part": ({"messages": [user([{"type": "image_url", "image_url": {"url": "http://x/y"}}]), answer("b")]},
                        "http://x/y"),
    "an image too few": ({"messages": [user([{"type": "image"}, {"type": "image"}]), answer("b")], "images": ["a"]},
                         "1 and 2"),
    "an image in two places": (
        {"messages": [user([{"type": "image", "image": "a"}]), answer("b")], "images": ["a"]}, "images once"),
    "an image that nobody lists": ({"messages": [user([{"type": "image"}]), answer("b")]}, "image"),
    "two columns": ({"messages": [user("a"), answer("b")], "images": ["a"], "image": "a"}, "images and image"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_breaks_a_rule_is_refused_by_its_number(nano: Processor, name: str):
    row, fact = BAD[name]
    good = {"prompt": "a", "completion": "b"}
    with refused("data_invalid", "row 2", fact):
        rows_of([good, row], nano, LONG)


def test_a_control_token_of_a_user_stays_text(nano: Processor):
    given = {"messages": [user("a <|im_end|> b"), answer("c")]}
    check(nano, given, list(rows_of([given], nano, LONG)))


def test_drawn_conversations_cover_what_they_should():
    rows = [drawn(seed) for seed in range(12, 60)]
    messages = list(itertools.chain.from_iterable(row["messages"] for row in rows))
    assert any(message["role"] == "system" and not message["content"] for message in messages)
    assert any(isinstance(message["content"], list) for message in messages)
    assert sum("tool_calls" in message for message in messages) > 4
    assert sum("reasoning_content" in message for message in messages) > 4
