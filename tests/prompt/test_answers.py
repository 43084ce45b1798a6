"""Text of an answer -> reasoning, content and typed calls, whatever the pieces that it comes in."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from mlx_qwen35 import Processor, parse_answer
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.prompt.answer import AnswerParser
from mlx_qwen35.prompt.piece import Piece
from mlx_qwen35.prompt.tool_calls import Kind, Tools

DATA = json.loads((Path(__file__).parent / "tool_calls.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in DATA["cases"]}
TAGS = re.compile("(</?think>)")


def call(name: str, *arguments: tuple[str, str]) -> str:
    """A call as the chat template writes it."""
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def write(content: str) -> str:
    return call("write_file", ("path", "a"), ("content", content))


def tools(name: str) -> list[dict[str, Any]]:
    return DATA["tools"][name]


def shown(answer: Any) -> dict[str, Any]:
    """An answer in the terms of tool_calls.json."""
    cut = answer.cut and {"name": answer.cut.name, "arguments": answer.cut.arguments, "open": answer.cut.open}
    calls = [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
    return {
        "reasoning": answer.reasoning, "content": answer.content, "calls": calls, "cut": cut,
        "finish_reason": answer.finish_reason,
    }  # fmt: skip


def streamed(text: str, offered: Tools | None, thinking: bool, cut: bool, pieces: Any) -> tuple[Any, ...]:
    """What comes of a text in pieces of these lengths: events, adjoining ones joined; calls; a cut one."""
    parser, out = AnswerParser(offered, thinking, "call_{}".format), []
    for part in TAGS.split(text):
        if TAGS.fullmatch(part):
            out += parser.think(part == "<think>")
            continue
        start = 0
        while start < len(part):
            stop = start + pieces()
            out += parser.feed(part[start:stop])
            start = stop
    out += parser.finish(cut)
    joined: list[Piece] = []
    for piece in out:
        if joined and (joined[-1].kind, joined[-1].id) == (piece.kind, piece.id) and piece.text:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.kind, piece.id, piece.name)
        else:
            joined.append(piece)
    return joined, parser.calls, parser.cut


def check_splits(text: str, offered: Tools | None, thinking: bool, cut: bool, seed: int = 0) -> None:
    """Any split gives the same, and the arguments' text is the JSON of the arguments."""
    rng = random.Random(seed)
    whole = streamed(text, offered, thinking, cut, lambda: len(text) + 1)
    for pieces in (lambda: 1, lambda: rng.randrange(1, 9)):
        assert streamed(text, offered, thinking, cut, pieces) == whole, repr(text)
    events, calls, _ = whole
    for found in calls:
        own = [event for event in events if event.id == found.id]
        assert [own[0].kind, own[-1].kind] == ["tool_call", "tool_call_end"] and own[0].name == found.name
        assert json.loads("".join(event.text for event in own)) == found.arguments


# --- the written cases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_written_case(name):
    case = CASES[name]
    offered = tools(case["tools"])
    answer = parse_answer(case["text"], offered, case["thinking"], case["ended"], case["tool_choice"])
    assert shown(answer) == case["expect"], case["why"]


@pytest.mark.parametrize("name", CASES)
def test_a_written_case_in_any_pieces(name):
    case = CASES[name]
    offered = None if case["tool_choice"] == "none" else Tools(tools(case["tools"]))
    check_splits(case["text"], offered, case["thinking"], case["ended"] == "length")


CONTENTS = {
    "a closing tag in prose": "Close it with </parameter> and </function>.",
    "a whole call twice, then prose": f"{call('f', ('s', 'x'))}\n{call('f', ('s', 'y'))}\nEnd.",
    "an indented call": call("f", ("s", "1")).replace("\n", "\n    ") + "\nEnd.",
    "a call in one line": "<tool_call><function=f><parameter=s>1</parameter></function></tool_call> is one.",
    "a tag in backticks": "Use `<function=name>` and `<parameter=key>` there.",
    "Windows line ends": "a\r\nb\r\n",
    "only line ends": "\n\n\n",
    "an unfinished tag": "1 < 2 and </par",
    "a code fence": "```\n<p>\n```",
    "characters of four bytes": "👩‍🚀 \u2028 \ufffd",
    "quotes and backslashes": 'say "hi" \\n \\" {}',
    "control characters": "\x00\x1b[31m\ttab",
    "a closer in front of text": "a\n</parameter>\nb\n</parameter>\nc",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_value_is_kept_as_it_was_written(name):
    text = write(CONTENTS[name])
    answer = parse_answer(text, tools("files"), thinking=False)
    assert answer.tool_calls[0].arguments == {"path": "a", "content": CONTENTS[name]} and answer.content is None
    check_splits(text, Tools(tools("files")), False, False)


DEVIATIONS = {
    "</function> alone closes": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</function>\n</tool_call>", {"city": "Oslo"}),
    "</tool_call> alone closes": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</tool_call>", {"city": "Oslo"}),
    "nothing but </tool_call> closes": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</tool_call>", {"city": "Oslo"}),
    "prose between parameters": (
        "<tool_call>\n<function=get_weather>\nin:\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
        {"city": "Oslo"}),
    "Windows line ends": (
        call("get_weather", ("city", "Oslo"), ("days", "2")).replace("\n", "\r\n"), {"city": "Oslo", "days": 2}),
    "a string that is never null": (call("get_time", ("city", "None")), {"city": "None"}),
    "a name with blanks": ("<tool_call><function= get_time ><parameter= city >Oslo</parameter></function></tool_call>",
                           {"city": "Oslo"}),
}  # fmt: skip


@pytest.mark.parametrize("name", DEVIATIONS)
def test_a_deviation_is_read(name):
    text, arguments = DEVIATIONS[name]
    answer = parse_answer(text, tools("weather"), thinking=False)
    assert [found.arguments for found in answer.tool_calls] == [arguments], answer
    check_splits(text, Tools(tools("weather")), False, False)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>", "<tool_call>\n", "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "1 <tool_call> 2 </tool_call> 3", '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "ping", "arguments": [1]}\n</tool_call>', "a `<tool_call>` b",
        "see <function=ping>\n</function>", f"~~~\n{call('ping')}\n~~~", f"````\n```\n{call('ping')}\n```\n````",
    ],
)  # fmt: skip
def test_what_is_no_call_is_content(text):
    answer = parse_answer(text, tools("weather"), thinking=False)
    assert (answer.content, answer.tool_calls, answer.cut) == (text.rstrip(), (), None)
    check_splits(text, Tools(tools("weather")), False, False)


def test_a_line_with_code_opens_no_fence():
    answer = parse_answer(f"```x``` is code\n{call('ping')}", tools("weather"), thinking=False)
    assert answer.content == "```x``` is code" and len(answer.tool_calls) == 1


def test_without_tools_every_answer_is_text():
    text = f"Look:\n\n{call('ping')}"
    assert shown(parse_answer(text, None, thinking=False)) == {
        "reasoning": None, "content": text, "calls": [], "cut": None, "finish_reason": "stop"
    }  # fmt: skip


@pytest.mark.parametrize("draft", ["", f"{call('ping')}\nno.\n"])
def test_calls_of_thinking_that_is_never_closed_are_numbered_from_the_first(draft):
    text = f"Hm.\n{draft}{call('get_time', ('city', 'Oslo'))}\n{call('ping')}\n"
    answer = parse_answer(text, tools("weather"))
    assert [(found.id, found.name) for found in answer.tool_calls] == [("call_0", "get_time"), ("call_1", "ping")]
    check_splits(text, Tools(tools("weather")), True, False)


NESTED = "x\n</parameter>\ny"
TWO_CALLS = f"{write(NESTED)}\n{call('run', ('cmd', 'ls'), ('timeout', '2.5'))}"


@pytest.mark.parametrize("stop", range(1, len(TWO_CALLS)))
def test_an_answer_that_is_cut_anywhere_gives_only_what_it_will_have(stop):
    """Its whole calls, the whole arguments of the one under way, and a beginning of the open one."""
    answer = parse_answer(TWO_CALLS[:stop], tools("files"), thinking=False, ended="length")
    assert answer.finish_reason == "length" and "<tool_call>".startswith(answer.content or "")
    final = [{"path": "a", "content": NESTED}, {"cmd": "ls", "timeout": 2.5}]
    whole = [found.arguments for found in answer.tool_calls]
    assert whole == final[: len(whole)]
    if answer.cut and answer.cut.name:
        expected = final[len(whole)]
        begun = {**answer.cut.arguments, **answer.cut.open}  # behind </parameter> an argument counts as whole
        assert all(str(expected[key]).startswith(str(value)) for key, value in begun.items()), answer.cut


# --- any text ---------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<function=get_weather>", "<function=write_file>", "<function=f>", "</function>",
    "<parameter=city>", "<parameter=content>", "<parameter=ns>", "<parameter=i>", "</parameter>", "</parameter1>",
    "\n", "\n", "\n", " ", "  ", "\r\n", "```", "`", "~~~", "a", "5", "null", "None", "text ", "{", '"', "}", "<", "</",
    "<p", "\\", "é", "\ufffd", "<think>", "</think>", '{"name": "get_weather", "arguments": {"city": "x"}}',
]  # fmt: skip


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(5, 100))])
def test_any_text_in_any_pieces(seed):
    """Fragments put together, and written cases with fragments put in."""
    rng = random.Random(seed)
    for _ in range(100):
        if rng.random() < 0.3:
            text = rng.choice(DATA["cases"])["text"]
            for _ in range(rng.randrange(1, 4)):
                place = rng.randrange(len(text) + 1)
                text = text[:place] + rng.choice(FRAGMENTS) + text[place + rng.choice([0, 0, 1, 3]) :]
        else:
            text = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(1, 40)))
        offered = Tools(tools(rng.choice(["weather", "files", "types"])))
        check_splits(text, offered, rng.random() < 0.3, rng.random() < 0.5, seed)


def test_a_long_value_is_given_out_as_it_comes():
    """Of a value that can be nothing else no more waits than a tag may have."""
    parser = AnswerParser(Tools(tools("files")), False, "call_{}".format)
    parser.feed("<tool_call>\n<function=write_file>\n<parameter=content>\n")
    given = fed = ""
    for number in range(300):
        piece = f"line {number} < {number + 1}\n"
        given += "".join(piece.text for piece in parser.feed(piece))
        fed += piece
        value = json.loads(given + '"}')["content"]
        assert fed.startswith(value) and len(fed) - len(value) < 30


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"enum": ["5", 6]}, "5", "5"), ({"enum": [5, "6"]}, "5", 5), ({"enum": [True, None]}, "True", True),
        ({"enum": [1.5]}, "1.50", 1.5), ({"const": "on"}, "'on'", "on"), ({"enum": ['"on"', "on"]}, '"on"', '"on"'),
        ({"type": ["integer", "string"]}, "x", "x"), ({"oneOf": [{"type": "boolean"}, {"type": "number"}]}, "1", 1),
        ({"anyOf": [{"type": "object"}, {"type": "array"}]}, "[1]", [1]), ({"type": "array"}, "(1, 2)", [1, 2]),
        ({"$ref": "#/$defs/a"}, "7", 7), ({"$ref": "#/$defs/loop"}, "7", "7"), ({"$ref": "#/none"}, "7", "7"),
        ({"$ref": "other.json#/a"}, "7", "7"), ({"type": "integer"}, "1e3", 1000), ({"type": "integer"}, "1.5", "1.5"),
        ({"type": "number"}, "1e999", "1e999"), ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"type": "object"}, "[" * 5000, "[" * 5000), ({"type": "object"}, "{1: 2}", "{1: 2}"),
        ({"type": "object"}, '{"a": NaN}', '{"a": NaN}'), ({"type": 7}, "x", "x"), ({"anyOf": 3}, "x", "x"),
        ({"type": ["string", "null"]}, "null", None), ({"type": ["string", "null"]}, "nullify", "nullify"),
        ({}, "[1, null]", [1, None]), ({}, "plain", "plain"),
    ],
)  # fmt: skip
def test_a_text_is_typed_by_its_schema(schema, text, value):
    root = {"$defs": {"a": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    found = Kind(schema, root).value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("tool", [None, 3, {}, {"function": 3}, {"function": {"name": "f", "parameters": [1]}},
                                  {"function": {"name": "f", "parameters": {"properties": [1]}}}])  # fmt: skip
def test_a_tool_that_cannot_be_used_types_nothing(tool):
    answer = parse_answer(call("f", ("x", "5")), [tool], thinking=False)
    assert answer.tool_calls[0].arguments == {"x": "5"}


# --- there and back ---------------------------------------------------------------------------------------------------

WORDS = ["Oslo", "São Paulo", "a  b", " x ", "", "\n", "two\nlines\n", "5", "true", '{"a": 1}', "<p>1 < 2</p>", "日本"]


def random_value(rng: random.Random) -> tuple[dict[str, Any], Any]:
    """A schema and a value of it."""
    word = rng.choice(WORDS)
    return rng.choice(
        [
            ({"type": "string"}, word),
            ({"type": "integer"}, rng.randrange(-(10**12), 10**12)),
            ({"type": "number"}, rng.uniform(-1e6, 1e6)),
            ({"type": "boolean"}, rng.random() < 0.5),
            ({"type": ["string", "null"]}, rng.choice([None, word])),
            ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, rng.choice([None, rng.randrange(100)])),
            ({"enum": ["on", "off", 3]}, rng.choice(["on", "off", 3])),
            ({"type": "array"}, [rng.choice(WORDS), None, True, 1.5, {"k": [rng.choice(WORDS)]}]),
            ({"type": "object"}, {rng.choice("abc"): rng.choice([word, 5, None, [True]]) for _ in range(3)}),
        ]
    )


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(resolve("nano"), read_config(resolve("nano")))


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 10))])
def test_calls_that_the_template_writes_are_read_back(processor, seed):
    rng = random.Random(seed)
    for _ in range(100):
        calls, offered = [], []
        for number in range(rng.randrange(1, 4)):
            named = {f"p{i}": random_value(rng) for i in range(rng.randrange(4))}
            schemas = {name: schema for name, (schema, _) in named.items()}
            parameters = {"type": "object", "properties": schemas}
            offered.append({"type": "function", "function": {"name": f"f{number}", "parameters": parameters}})
            calls.append({"name": f"f{number}", "arguments": {name: value for name, (_, value) in named.items()}})
        said = rng.choice(["", "I look.", "One\n\ntwo."])
        messages = [{"role": "user", "content": "?"}]
        messages += [{"role": "assistant", "content": said, "tool_calls": [{"function": found} for found in calls]}]
        rendered = processor.render(messages, tools=offered, add_generation_prompt=False)
        text = rendered.rpartition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
        answer = parse_answer(text, offered, thinking=False)
        assert shown(answer)["calls"] == calls and (answer.content or "") == said
        check_splits(text, Tools(offered), False, False, seed)
