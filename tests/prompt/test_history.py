"""A history as clients send it reads as the same history in the form of the chat templates, or is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from refusing import refused

from mlx_qwen35 import Processor, generate, load

HI = {"role": "user", "content": "Hi"}
DONE = {"role": "assistant", "content": "Done."}


def said(role: str, content: Any, **fields: Any) -> dict:
    return {"role": role, "content": content, **fields}


def calls(*arguments: Any, **fields: Any) -> dict:
    """An assistant's message with calls of f; their ids are a, b, c."""
    given = [
        {"id": name, "type": "function", "function": {"name": "f", "arguments": value}}
        for name, value in zip("abc", arguments, strict=False)
    ]
    return {"role": "assistant", "content": None, "tool_calls": given, **fields}


def results(*pairs: tuple[str | None, Any]) -> list[dict]:
    return [said("tool", text, **{"tool_call_id": name} if name else {}) for name, text in pairs]


NESTED = {"b": "é\n", "a": [1, None, {"k": True}], "n": 1.5}
THREE = calls({}, {}, {})
IN_ORDER = results(("a", "1"), ("b", "2"), ("c", "3"))

# name: as clients send it, as the templates read it
SAME = {
    "arguments as JSON": ([HI, calls(json.dumps(NESTED))], [HI, calls(NESTED)]),
    "arguments as JSON with escapes and blanks": (
        [HI, calls(' {"b": "\\u00e9\\n",\n"a":[1,null,{"k":true}],"n":1.5}\n')],
        [HI, calls(NESTED)],
    ),
    "arguments as JSON without arguments": ([HI, calls("{}")], [HI, calls({})]),
    "arguments as a blank text": ([HI, calls("", " \n")], [HI, calls({}, {})]),
    "no arguments": ([HI, said("assistant", "", tool_calls=[{"function": {"name": "f"}}])], [HI, calls({})]),
    "an index and null fields, as programs write messages": (
        [HI, {
            "content": None, "refusal": None, "role": "assistant", "annotations": [], "audio": None,
            "function_call": None, "reasoning_content": None,
            "tool_calls": [{"id": "a", "index": 0, "type": "function", "function": {"arguments": "{}", "name": "f"}}],
        }],
        [HI, calls({})],
    ),
    "a developer": ([said("developer", "S"), HI], [said("system", "S"), HI]),
    "a developer behind the system": (
        [said("system", "S"), said("developer", "D"), HI],
        [said("system", "S\n\nD"), HI],
    ),
    "system messages later on": (
        [said("system", "S"), HI, DONE, said("system", "T"), HI, said("system", "U")],
        [said("system", "S\n\nT\n\nU"), HI, DONE, HI],
    ),
    "a system message that is not the first": (
        [HI, said("system", "S"), DONE, HI],
        [said("system", "S"), HI, DONE, HI],
    ),
    "a blank system message later on": (
        [said("system", "S"), HI, said("system", " "), said("system", [])],
        [said("system", "S"), HI],
    ),
    "a blank system message between two": (
        [said("system", "S"), HI, said("system", " "), said("system", "T")],
        [said("system", "S\n\nT"), HI],
    ),
    "system messages in parts": (
        [said("system", [{"type": "text", "text": "S"}]), said("system", "T"), said("developer", [{"text": "U"}]), HI],
        [said("system", "S\n\nT\n\nU"), HI],
    ),
    "results in another order": (
        [HI, THREE, *results(("c", "3"), ("a", "1"), ("b", "2")), DONE],
        [HI, THREE, *IN_ORDER, DONE],
    ),
    "results in another order at the end": ([HI, THREE, *reversed(IN_ORDER)], [HI, THREE, *IN_ORDER]),
    "results without ids keep their order": (
        [HI, THREE, *results((None, "3"), (None, "1"), (None, "2"))],
        [HI, calls({}, {}, {}), *results(("a", "3"), ("b", "1"), ("c", "2"))],
    ),
    "a result without id keeps its place": (
        [HI, THREE, *results(("c", "3"), (None, "1"), ("b", "2"))],
        [HI, THREE, *results((None, "2"), (None, "1"), (None, "3"))],
    ),
    "results of some calls": ([HI, THREE, *results(("c", "3"), ("b", "2")), HI], [HI, THREE, *IN_ORDER[1:], HI]),
    "results around a system message": (
        [HI, THREE, IN_ORDER[1], said("system", "S"), IN_ORDER[0], IN_ORDER[2]],
        [said("system", "S"), HI, THREE, *IN_ORDER],
    ),
    "the same ids in two answers": (
        [HI, THREE, *reversed(IN_ORDER), THREE, *reversed(IN_ORDER)],
        [HI, THREE, *IN_ORDER, THREE, *IN_ORDER],
    ),
    "a result in parts": (
        [HI, calls({}), said("tool", [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}])],
        [HI, calls({}), said("tool", "12")],
    ),
    "reasoning under other names": (
        [HI, calls({}, reasoning="R"), *results(("a", "1"))],
        [HI, calls({}, reasoning_content="R"), *results(("a", "1"))],
    ),
    "reasoning alone": (
        [HI, {"role": "assistant", "reasoning": "R"}, HI, {"role": "assistant", "content": None, "thinking": "R"}],
        [HI, said("assistant", ""), HI, said("assistant", "<think>\nR\n</think>\n\n")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_what_clients_send_reads_as_the_usual_form(processor: Processor, name: str):
    sent, usual = SAME[name]
    before = json.dumps(sent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processor.render(sent) == processor.render(usual)
    assert json.dumps(sent) == before, "the caller's messages stay as they are"


REFUSED = {
    "an id that no call has": ([HI, calls({}), *results(("x", "1"))], ("messages[2]", "'a'", "'x'")),
    "an id where the calls have none": (
        [HI, said("assistant", "", tool_calls=[{"function": {"name": "f"}}]), *results(("a", "1"))],
        ("messages[2]", "'a'", "none"),
    ),
    "an id of an earlier answer": (
        [HI, calls({}), *results(("a", "1")), DONE, *results(("a", "1"))],
        ("messages[4]", "'a'", "none"),
    ),
    "an id behind a late system message": (
        [HI, calls({}), said("system", "S"), *results(("x", "1"))],
        ("messages[3]", "'x'"),
    ),
    "two results of one call": ([HI, calls({}, {}), *results(("a", "1"), ("a", "2"))], ("messages[3]", "'a'")),
    "two calls of one id": (
        [HI, said("assistant", "", tool_calls=[{"id": "a", "function": {"name": "f"}}] * 2)],
        ("messages[1]", "'a'"),
    ),
    "a number as id of a call": (
        [HI, said("assistant", "", tool_calls=[{"id": 7, "function": {"name": "f"}}])],
        ("messages[1].tool_calls[0]", "7"),
    ),
    "a number as id of a result": ([HI, calls({}), said("tool", "1", tool_call_id=7)], ("messages[2]", "7")),
    "JSON nested 65 deep": ([HI, calls('{"a": ' + "[" * 65 + "]" * 65 + "}")], ("messages[1]", "64")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_results_and_calls_that_do_not_belong_together_are_refused(processor: Processor, name: str):
    messages, facts = REFUSED[name]
    with refused("messages_invalid", *facts):
        processor.render(messages)


@pytest.mark.parametrize(
    "text", ["{'city': 'Paris'}", '{"city": "Par', "[1]", "5", '{"a": NaN}', "[" * 100_000, '"text"', "\x00"]
)
def test_arguments_that_are_no_json_object_become_one_parameter_and_a_warning(processor: Processor, text: str):
    with pytest.warns(RuntimeWarning, match="arguments"):
        rendered = processor.render([HI, calls(text)])
    assert rendered == processor.render([HI, calls({"arguments": text})])


def test_the_warning_is_told_once_for_each_line_that_gives_such_messages():
    model, processor = load("nano")
    broken = [HI, calls("{"), *results(("a", "1"))]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            generate(model, processor, messages=broken, max_tokens=1, enable_thinking=False)
        processor.render(broken)
    places = [(Path(warning.filename).name, warning.lineno) for warning in told]
    assert [name for name, _ in places] == ["test_history.py"] * 2 and places[0] < places[1]


def test_an_image_in_a_result_is_read():
    _, processor = load("nano")
    picture = {"type": "image", "image": Path(__file__).parents[2] / "examples/pictures/triangle.png"}
    prompt = processor.encode_messages([HI, calls({}), said("tool", [picture, {"type": "text", "text": "it"}])])
    assert [len(placed.placeholders) for placed in prompt.media] == [1]
