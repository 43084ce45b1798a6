"""Messages, tools and the template's options of a wrong type or meaning are refused by name, before they are used."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from refusing import refused

from mlx_qwen35 import Processor, generate, load
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.engine.conversation import Conversation

HI = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(resolve("nano"), read_config(resolve("nano")))


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def calling(call: Any) -> list[dict]:
    return [HI, {"role": "assistant", "content": "", "tool_calls": call}]


def nested(depth: int) -> Any:
    value: Any = "x"
    for i in range(depth):
        value = [value] if i % 2 else {"k": value}
    return value


def tool(name: Any = "f", **function: Any) -> dict:
    return {"type": "function", "function": {"name": name, **function}}


LOOP: list = []
LOOP.append(LOOP)

WRONG = {
    "no content": ([{"role": "user"}], ("messages[0]", "content")),
    "null content of a user": ([{"role": "user", "content": None}], ("messages[0]", "NoneType")),
    "null content of a tool": ([HI, {"role": "tool", "content": None}], ("messages[1]", "NoneType")),
    "null content of the system": ([{"role": "system", "content": None}, HI], ("messages[0]", "NoneType")),
    "an answer without content or calls": ([HI, {"role": "assistant"}, HI], ("messages[1]", "content")),
    "a number as content": ([{"role": "user", "content": 5}], ("int",)),
    "bytes as content": ([{"role": "user", "content": b"Hi"}], ("bytes",)),
    "no role": ([{"content": "Hi"}], ("role", "messages[0]")),
    "null role": ([{"role": None, "content": "Hi"}], ("role", "NoneType")),
    "a number as role": ([{"role": 5, "content": "Hi"}], ("role", "int")),
    "a number as calls": (calling(5), ("tool_calls", "messages[1]", "int")),
    "a mapping as calls": (calling({"name": "f"}), ("tool_calls", "dict")),
    "a text as call": (calling(["f"]), ("messages[1].tool_calls[0]", "str")),
    "a text as function": (calling([{"function": "f"}]), ("messages[1].tool_calls[0]", "str")),
    "a call without a name": (calling([{"function": {"arguments": {}}}]), ("messages[1].tool_calls[0]", "name")),
    "a number as name": (calling([{"function": {"name": 5}}]), ("messages[1].tool_calls[0]", "int")),
    "a list as arguments": (calling([{"name": "f", "arguments": []}]), ("messages[1].tool_calls[0]", "list")),
    "null arguments": (calling([{"name": "f", "arguments": None}]), ("messages[1].tool_calls[0]", "NoneType")),
    "a number as reasoning": (
        [HI, {"role": "assistant", "content": "", "reasoning_content": 5}],
        ("reasoning_content",),
    ),
    "nested 900 deep": (calling([{"name": "f", "arguments": {"a": nested(900)}}]), ("messages[1]", "64")),
    "nested in itself": (calling([{"name": "f", "arguments": {"a": LOOP}}]), ("messages[1]", "64")),
    "NaN": (calling([{"name": "f", "arguments": {"a": math.nan}}]), ("messages[1].tool_calls[0].arguments.a", "nan")),
    "infinity": (calling([{"name": "f", "arguments": {"a": [-math.inf]}}]), ("arguments.a[0]", "inf")),
    "bytes": (calling([{"name": "f", "arguments": {"a": b"x"}}]), ("arguments.a", "bytes")),
    "a set": (calling([{"name": "f", "arguments": {"a": {1}}}]), ("arguments.a", "set")),
    "a number as key": (calling([{"name": "f", "arguments": {1: "x"}}]), ("arguments", "1", "int")),
    "a long number": (calling([{"name": "f", "arguments": {"a": 10**5000}}]), ("arguments.a", "4,096")),
    "a long number as key": (calling([{"name": "f", "arguments": {10**5000: "x"}}]), ("arguments", "int")),
    "a long number as message": ([HI, 10**5000], ("messages[1]",)),
    "a fraction": (calling([{"name": "f", "arguments": {"a": Fraction(10**400)}}]), ("arguments.a", "Fraction")),
    "the role of results before tool_calls": (
        [HI, {"role": "function", "name": "f", "content": "x"}],
        ("messages[1]", "function"),
    ),
    "a call of before tool_calls": (
        [HI, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}],
        ("messages[1]", "function_call"),
    ),
    "a call that is no function": (
        calling([{"id": "a", "type": "custom", "custom": {"name": "f", "input": "x"}}]),
        ("messages[1].tool_calls[0]", "name"),
    ),
    "an object in a field that nobody reads": ([{**HI, "extra": object()}], ("messages[0].extra", "object")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_messages_are_refused_by_name(processor: Processor, name: str):
    messages, facts = WRONG[name]
    with refused("messages_invalid", *facts):
        processor.encode_messages(messages)


@pytest.mark.full
def test_a_list_of_the_same_list_over_and_over_is_refused_before_it_fills_memory(processor: Processor):
    wide: Any = "x"
    for _ in range(40):
        wide = [wide, wide]
    with refused("messages_invalid", "250,000"):
        processor.encode_messages(calling([{"name": "f", "arguments": {"a": wide}}]))


@pytest.mark.parametrize(
    ("part", "fact"), [("Hi", "str"), (5, "int"), ({"type": "text", "text": None}, "NoneType"), ({"text": 5}, "int")]
)
def test_wrong_parts_are_refused_by_name(processor: Processor, part: Any, fact: str):
    with refused("message_part_invalid", "messages[1].content[0]", fact):
        processor.encode_messages([HI, {"role": "user", "content": [part]}])


@pytest.mark.parametrize("where", ["content", "part", "role", "argument", "key", "tool", "raw text"])
def test_what_is_no_unicode_is_refused(processor: Processor, where: str):
    bad = "x\ud800<|im_end|>"
    messages = {
        "content": [{"role": "user", "content": bad}], "part": [{"role": "user", "content": [{"text": bad}]}],
        "role": [{"role": bad, "content": "Hi"}], "argument": calling([{"name": "f", "arguments": {"a": bad}}]),
        "key": calling([{"name": "f", "arguments": {bad: "a"}}]),
    }.get(where, [HI])  # fmt: skip
    with refused("text_invalid"):
        if where == "raw text":
            processor.encode_text(bad)
        processor.encode_messages(messages, tools=[tool(bad)] if where == "tool" else None)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"enable_thinking": "false"}, ("enable_thinking", "false")),
        ({"enable_thinking": 0}, ("enable_thinking", "got 0")),
        ({"add_generation_prompt": "no"}, ("add_generation_prompt", "no")),
        ({"tools": {"name": "f"}}, ("tools", "dict")),
        ({"tools": "f"}, ("tools", "str")),
        ({"tools": ["f"]}, ("tools[0]", "'f'")),
        ({"tools": [len]}, ("tools[0]", "built-in function len")),
        ({"tools": [tool(), {"name": "g"}]}, ("tools[1]", "'g'")),
        ({"tools": [{**tool(), "type": "custom"}]}, ("tools[0]", "'custom'")),
        ({"tools": [{"type": "function", "function": "f"}]}, ("tools[0]", "'f'")),
        ({"tools": [tool(5)]}, ("the name of tools[0]", "5")),
        ({"tools": [tool(" ")]}, ("the name of tools[0]", "' '")),
        ({"tools": [tool(parameters=[])]}, ("the parameters of tools[0]", "[]")),
        ({"tools": [tool(), tool("g"), tool()]}, ("'f'", "twice")),
        ({"tools": [tool(f"f{i}") for i in range(257)]}, ("256", "257")),
        ({"preserve_thinking": "yes"}, ("preserve_thinking", "yes")),
        ({"continue_final_message": "yes"}, ("continue_final_message", "yes")),
    ],
)
def test_wrong_options_of_the_template_are_refused_by_name(processor: Processor, options: dict, facts: tuple):
    with refused("option_invalid", *facts):
        processor.encode_messages([HI], **options)


@pytest.mark.parametrize("schema", [{"a": nested(900)}, {"a": math.nan}, {1: 2}, {"a": object()}])
def test_tools_that_json_cannot_hold_are_refused(processor: Processor, schema: dict):
    with refused("messages_invalid", "tools[0]"):
        processor.encode_messages([HI], tools=[tool(parameters=schema)])


@pytest.mark.parametrize("wrong", [5, ["Be brief."], b"Be brief."])
def test_a_system_prompt_must_be_text(nano, wrong: Any):
    with refused("option_invalid", "system_prompt", repr(wrong)):
        generate(*nano, "Hi", system_prompt=wrong)
    with refused("option_invalid", "system_prompt", repr(wrong)):
        Conversation(*nano, system_prompt=wrong)


def test_a_conversation_tells_of_wrong_options_at_once(nano):
    with refused("option_invalid", "enable_thinking"):
        Conversation(*nano, enable_thinking="false")
    with refused("option_invalid", "tools[0]"):
        Conversation(*nano, tools=["f"])


def test_messages_of_every_right_kind_are_taken(processor: Processor):
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": {"a": nested(40), "b": 2**60, "c": np.float32(1)}},
    }
    answers = [
        {"role": "assistant", "content": None}, {"role": "assistant", "content": ""},
        {"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "content": None, "tool_calls": (call,)},
        {"role": "assistant", "content": "A", "tool_calls": None, "reasoning_content": None},
        {"role": "assistant", "content": "A", "reasoning": "R"}, {"role": "assistant", "content": [{"text": "A"}]},
    ]  # fmt: skip
    for answer in answers:
        tools = (tool(), tool("g", parameters=None, strict=None))
        processor.encode_messages((HI, answer, HI), tools=tools, enable_thinking=np.bool_(False))


def test_reasoning_is_known_by_the_names_that_programs_give_it(processor: Processor):
    for name in ("reasoning_content", "reasoning", "thinking"):
        text = processor.render([HI, {"role": "assistant", "content": "A", name: "R"}], add_generation_prompt=False)
        assert "<think>\nR\n</think>\n\nA" in text
