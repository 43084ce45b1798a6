"""A conversation with tools: calls of an answer, their results, and what of the prompt is prefilled again."""

from typing import Any

import pytest
from refusing import refused
from tasks.tools import TIME_TOOLS, WEATHER_TOOLS

from mlx_qwen35 import Conversation, generate, load

TOOLS = [WEATHER_TOOLS[0], TIME_TOOLS[0]]
WEATHER, TIME = "What is the weather in Paris?", "What time is it in Oslo?"
SKY = "21 degrees, sunny"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def talk(nano):
    return lambda **options: Conversation(*nano, **{"tools": TOOLS, "temp": 0, "mtp": "off"} | options)


def called(conversation: Conversation, question: str = WEATHER) -> str:
    """The id of the call that answers a question."""
    turn = conversation.send(question)
    assert turn.text == "" and turn.result.finish_reason == "tool_calls"
    (call,) = turn.result.tool_calls
    return call.id


def two_calls(conversation: Conversation) -> None:
    """Put an answer with two calls into the history, as a model that calls both at once gives."""
    calls = [
        {"id": name, "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
        for name, city in (("a", "Paris"), ("b", "Oslo"))
    ]
    conversation.messages = [
        {"role": "user", "content": "What is the weather in Paris and in Oslo?"},
        {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": calls},
    ]


@pytest.mark.parametrize("thinking", [True, pytest.param(False, marks=pytest.mark.full)])
def test_results_are_reported_and_each_message_is_prefilled_once(talk, thinking):
    conversation = talk(enable_thinking=thinking)
    first = conversation.send(WEATHER)
    (call,) = list(first) and first.result.tool_calls
    assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
    query = len(conversation.processor.encode_messages(
        [{"role": "user", "content": WEATHER}], tools=TOOLS, add_generation_prompt=False
    ).tokens)  # fmt: skip
    second = conversation.send_results({call.id: SKY})
    assert second.text == "It is 21 degrees and sunny in Paris."
    assert (first.reused, second.reused) == (0, query)
    third = conversation.send(TIME)
    (call,) = list(third) and third.result.tool_calls
    assert third.reused == query  # the template drops the thoughts behind it, as of now
    fourth = conversation.send_results([{"role": "tool", "tool_call_id": call.id, "content": "12:30"}])
    assert fourth.text == "It is 12:30 in Oslo." and fourth.reused > third.total - 10
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant", "tool", "assistant"] * 2


@pytest.mark.full
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("mtp", ["off", "on"])
def test_every_answer_is_that_of_the_whole_history(nano, talk, thinking, mtp):
    conversation = talk(enable_thinking=thinking, mtp=mtp)
    turns: list = []
    for send in (
        lambda: conversation.send(WEATHER),
        lambda: conversation.send_results({turns[-1].result.tool_calls[0].id: SKY}),
        lambda: conversation.send(TIME),
        lambda: conversation.send_results({turns[-1].result.tool_calls[0].id: "12:30"}),
    ):
        turns.append(send())
        text = turns[-1].text
        history = conversation.messages[:-1]
        alone = generate(*nano, messages=history, tools=TOOLS, temp=0, mtp="off", enable_thinking=thinking)
        assert (alone.text, alone.tokens) == (text, turns[-1].result.tokens)


def test_several_steps_go_back_to_the_newest_snapshot_and_the_next_query_to_the_last_query_s(talk):
    conversation, places = talk(max_tokens=4, enable_thinking=True), []
    for step in range(3):
        turn = conversation.send_results({str(step - 1): SKY}) if step else conversation.send(WEATHER)
        assert list(turn)
        places.append(turn.reused)
        call = {"id": str(step), "type": "function", "function": {"name": "get_time", "arguments": {}}}
        conversation.messages[-1]["tool_calls"] = [call]
    assert places[0] == 0 < places[1] < places[2]
    turn = conversation.send(TIME)
    assert list(turn) and turn.reused == places[1]


def test_an_answer_is_kept_with_its_reasoning_and_its_calls(talk):
    conversation = talk(enable_thinking=True)
    call = called(conversation)
    assert conversation.messages[1] == {
        "role": "assistant", "content": "", "reasoning_content": "I need the weather in Paris.",
        "tool_calls": [
            {"id": call, "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
        ],
    }  # fmt: skip


def test_a_call_that_is_cut_is_no_call_of_the_history(talk):
    conversation = talk(enable_thinking=False, max_tokens=12)
    turn = conversation.send(WEATHER)
    assert turn.text == "" and turn.result.finish_reason == "length" and turn.result.cut
    assert "tool_calls" not in conversation.messages[1]


def test_results_come_in_the_order_of_the_calls(talk):
    conversation = talk(enable_thinking=False, max_tokens=2)
    two_calls(conversation)
    assert list(conversation.send_results({"b": "2", "a": "1"}))
    kept = [(message["tool_call_id"], message["content"]) for message in conversation.messages[2:4]]
    assert kept == [("a", "1"), ("b", "2")]


def result(call: Any, content: Any = "x", **fields: Any) -> dict:
    return {"role": "tool", "tool_call_id": call, "content": content, **fields}


@pytest.mark.parametrize(
    ("results", "facts"),
    [
        ({"a": "1", "b": "2", "x": "3"}, ("'a', 'b'", "'x'")),
        ({"a": "1"}, ("'b'",)),
        ({}, ("'a'",)),
        ([result("a"), result("b"), result("a")], ("'a', 'b'", "3 results")),
        ([result("a"), {"role": "tool", "content": "x"}], ("None",)),
        ([result("a"), {"role": "user", "content": "x"}], ("'user'",)),
        ([result("a"), result("b", result="x")], ("'result'",)),
        (["1", "2"], ("'1'",)),
        ("1", ("'1'",)),
        ({"a": "1", "b": None}, ("NoneType",)),
        ({"a": "1", "b": {"degrees": 21}}, ("dict",)),
    ],
)
def test_results_that_are_not_one_for_each_call_are_refused_at_once(talk, results, facts):
    conversation = talk()
    two_calls(conversation)
    with refused("messages_invalid", *facts):
        conversation.send_results(results)


def test_results_without_calls_before_them_are_refused(talk):
    conversation = talk(enable_thinking=False)
    with refused("messages_invalid", "calls"):
        conversation.send_results({"a": "1"})
    call = called(conversation)
    assert conversation.send_results({call: SKY}).text
    with refused("messages_invalid", "calls"):
        conversation.send_results({call: SKY})


def test_calls_may_stay_unanswered(talk):
    conversation = talk(enable_thinking=False)
    called(conversation)
    called(conversation, TIME)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_an_image_in_a_result_is_read_when_it_is_sent(talk, tmp_path):
    conversation = talk(enable_thinking=False, max_tokens=2)
    two_calls(conversation)
    with refused("media_not_found", "none.png"):
        conversation.send_results({"a": [{"type": "image", "image": tmp_path / "none.png"}], "b": "2"})
