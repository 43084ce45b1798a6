"""Tool calls over OpenAI's API: how they come, and how their history goes back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai_stream import events, folded
from serving import Running

from mlx_qwen35 import generate
from mlx_qwen35.prompt.tool_calls import Cut
from mlx_qwen35.server.replies import finish_reason

TOOLS = json.loads((Path(__file__).parents[2] / "examples" / "tools.json").read_text())
CITIES = "What is the weather in Paris and in Rome?"


def asked(server: Running, question: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "tools": TOOLS, "temperature": 0, "reasoning_effort": "none"} | fields
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer


def choice(server: Running, question: str, **fields: Any) -> dict[str, Any]:
    return asked(server, question, **fields).json()["choices"][0]


def calls(message: dict[str, Any]) -> list[tuple[str, Any]]:
    told = [call["function"] for call in message.get("tool_calls", [])]
    return [(call["name"], json.loads(call["arguments"])) for call in told]


def test_calls_come_one_behind_the_other_and_their_arguments_in_pieces(nano_server: Running) -> None:
    text = asked(nano_server, CITIES, stream=True).text
    (answer,) = folded(text)["choices"]
    assert calls(answer["message"]) == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]
    assert (answer["finish_reason"], answer["message"]["content"]) == ("tool_calls", None)
    deltas = [part["delta"].get("tool_calls", []) for chunk in events(text) for part in chunk["choices"]]
    pieces = [call["function"]["arguments"] for delta in deltas for call in delta if call["index"] == 0]
    assert len(pieces) > 3 and "".join(pieces) == '{"city": "Paris"}'


def test_one_call_where_no_more_are_wanted(nano_server: Running) -> None:
    answer = choice(nano_server, CITIES, parallel_tool_calls=False)
    assert calls(answer["message"]) == [("get_weather", {"city": "Paris"})]
    assert answer["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_has_the_arguments_so_far(nano_server: Running) -> None:
    fields = {"max_tokens": 12, "seed": 0}  # the id of a call follows from the seed
    answer = choice(nano_server, CITIES, **fields)
    assert answer["finish_reason"] == "length"
    (call,) = answer["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("get_weather", '{"city": "Paris')
    assert folded(asked(nano_server, CITIES, stream=True, **fields).text)["choices"] == [answer]


def test_an_answer_that_ends_inside_a_call_is_not_whole(nano_server: Running) -> None:
    result = generate(nano_server.service.model, nano_server.service.processor, "Hi", max_tokens=1)
    ended = replace(result, finish_reason="tool_calls", cut=Cut("get_weather", {}, {"city": "Ro"}))
    assert finish_reason(ended) == "length"


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ("none", set()),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
        pytest.param("required", {"get_weather", "get_time"}, marks=pytest.mark.full),
    ],
)
def test_a_choice_of_calls_is_held(nano_server: Running, wanted: Any, named: set[str]) -> None:
    answer = choice(nano_server, "Who are you?", tool_choice=wanted, seed=1, max_tokens=14)
    names = {call["function"]["name"] for call in answer["message"].get("tool_calls", [])}
    assert names <= named and bool(names) == bool(named)


# --- history: two requests with the same tokens have the same prompt --------------------------------------------------


def tokens(server: Running, *messages: dict[str, Any]) -> list[int]:
    answer = server.post("/tokenize", {"messages": [{"role": "user", "content": CITIES}, *messages], "tools": TOOLS})
    assert answer.status_code == 200, answer.text
    return answer.json()["tokens"]


def turn(*arguments: Any, **fields: Any) -> dict[str, Any]:
    made = [
        {"id": f"c{i}", "type": "function", "function": {"name": "get_weather", "arguments": given}}
        for i, given in enumerate(arguments)
    ]
    return {"role": "assistant", "content": None, "tool_calls": made} | fields


def result(number: int, text: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


def test_arguments_go_back_as_text_or_as_an_object(nano_server: Running) -> None:
    right = tokens(nano_server, turn({"city": "Paris"}), result(0, "sunny"))
    assert tokens(nano_server, turn('{"city": "Paris"}'), result(0, "sunny")) == right
    assert tokens(nano_server, turn('{"city": "Rome"}'), result(0, "sunny")) != right
    assert tokens(nano_server, turn(""), result(0, "")) == tokens(nano_server, turn({}), result(0, ""))


@pytest.mark.filterwarnings("ignore:the arguments of an earlier tool call:RuntimeWarning")
def test_broken_arguments_go_back_as_text(nano_server: Running) -> None:
    right = tokens(nano_server, turn({"arguments": '{"city": "Par'}), result(0, ""))
    assert tokens(nano_server, turn('{"city": "Par'), result(0, "")) == right


def test_results_are_put_in_the_order_of_their_calls(nano_server: Running) -> None:
    both = turn({"city": "Paris"}, {"city": "Rome"})
    first, second = result(0, "sunny"), result(1, [{"type": "text", "text": "rain"}])
    assert tokens(nano_server, both, second, first) == tokens(nano_server, both, first, second)
    assert tokens(nano_server, both, result(0, "rain"), result(1, "sunny")) != tokens(nano_server, both, first, second)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_goes_back_under_any_name(nano_server: Running, name: str) -> None:
    told = tokens(nano_server, turn({"city": "Paris"}, **{name: "I look."}), result(0, "sunny"))
    assert told == tokens(nano_server, turn({"city": "Paris"}, reasoning_content="I look."), result(0, "sunny"))
    assert told != tokens(nano_server, turn({"city": "Paris"}), result(0, "sunny"))


def test_a_developer_is_the_system_and_later_ones_join_it(nano_server: Running) -> None:
    def system(role: str, *texts: str) -> list[int]:
        messages = [{"role": role, "content": text} for text in texts] + [{"role": "user", "content": "hi"}]
        return nano_server.post("/tokenize", {"messages": messages}).json()["tokens"]

    assert system("developer", "Be brief.") == system("system", "Be brief.")
    assert system("developer", "Be", "brief.") == system("system", "Be\n\nbrief.")
