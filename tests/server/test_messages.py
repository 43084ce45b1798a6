"""POST /v1/messages and count_tokens over a real socket, by Anthropic's SDK and as Claude Code asks."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import pytest
from block_streams import events, message
from PIL import Image
from pydantic import BaseModel
from serving import Running

from mlx_qwen35 import generate
from mlx_qwen35.prompt.piece import CONTENT, Piece
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import Fields
from mlx_qwen35.server.messages import MessageReply
from mlx_qwen35.server.messages_request import conversation, options
from mlx_qwen35.server.service import Event

Json = dict[str, Any]
SUM = [{"role": "user", "content": "What is 34 + 58?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "get_weather", "description": "Get the weather in a city", "input_schema": CITY}]
ASKED: Json = {"model": "any", "max_tokens": 200, "extra_body": {"temperature": 0}}
MODES = [{}, {"thinking": {"type": "adaptive"}}]


@pytest.fixture
def client(nano_server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=nano_server.url, api_key="key", max_retries=0) as made:
        yield made


def image(color: str) -> Json:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def said(made: Any) -> tuple[str, str]:
    """Reasoning and content of a message."""
    return tuple("".join(getattr(block, kind, "") for block in made.content) for kind in ("thinking", "text"))  # type: ignore[return-value]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=["at once", "thinking"])
def test_the_text_is_that_of_generate_with_that_seed(
    nano_server: Running, client: anthropic.Anthropic, mode: Json
) -> None:
    service = nano_server.service
    own: Json = {"temp": 0.9, "top_k": 40, "seed": 7, "max_tokens": 60}
    result = generate(service.model, service.processor, SUM, **own, enable_thinking=bool(mode))
    given = {"model": "any", "max_tokens": 60, "messages": SUM, **mode}
    body: Json = {"temperature": 0.9, "top_k": 40, "seed": 7}
    whole = client.messages.create(**given, extra_body=body)
    with client.messages.stream(**given, extra_body=body) as stream:
        streamed = stream.get_final_message()
    assert said(whole) == said(streamed) == (result.reasoning, result.text)
    assert bool(result.reasoning) == bool(mode)
    assert whole.usage.output_tokens == streamed.usage.output_tokens == result.generation_tokens
    assert whole.model == "nano" and whole._request_id.startswith("req_")


def test_a_tool_loop_ends_in_an_answer(client: anthropic.Anthropic) -> None:
    messages: list[Any] = list(WEATHER)
    with client.messages.stream(messages=messages, tools=TOOLS, **MODES[1], **ASKED) as stream:
        turn = stream.get_final_message()
    thinking, call = turn.content
    assert (turn.stop_reason, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees, sunny"}
    messages += [{"role": "assistant", "content": turn.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=messages, tools=TOOLS, **MODES[1], **ASKED)
    assert said(answer)[1] == "It is 21 degrees and sunny in Paris."
    assert answer.stop_reason == "end_turn" and thinking.thinking
    assert answer.usage.cache_read_input_tokens > turn.usage.input_tokens * 0.9


@pytest.mark.parametrize("color", ["red", "blue"])
def test_images_are_seen_in_a_message_and_in_a_result(client: anthropic.Anthropic, color: str) -> None:
    asked = [{"role": "user", "content": [image(color), {"type": "text", "text": "What color is the image?"}]}]
    assert said(client.messages.create(messages=asked, **ASKED))[1] == color
    call = {"type": "tool_use", "id": "c", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": [image(color)]}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=WEATHER + turns, tools=TOOLS, **ASKED)
    assert color in said(answer)[1]


def test_counted_tokens_are_those_of_the_prompt(client: anthropic.Anthropic) -> None:
    asked: Json = {
        "system": "Be brief.",
        "messages": [{"role": "user", "content": [image("red"), {"type": "text", "text": "What color is it?"}]}],
        "tools": TOOLS,
        "thinking": {"type": "enabled", "budget_tokens": 100},
    }
    counted = client.messages.count_tokens(model="any", **asked).input_tokens
    usage = client.messages.create(**asked, **ASKED).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    assert usage.cache_creation_input_tokens == 0


def test_a_call_that_is_cut_is_told_by_max_tokens(nano_server: Running, client: anthropic.Anthropic) -> None:
    asked = {"messages": WEATHER, "tools": TOOLS, "temperature": 0}
    for most in range(10, 15):  # inside the name, the argument, the closing tags
        whole = nano_server.post("/v1/messages", asked | {"max_tokens": most}).json()
        made = message(nano_server.post("/v1/messages", asked | {"max_tokens": most, "stream": True}).text)
        assert whole["stop_reason"] == made["stop_reason"] == "max_tokens"
        assert [block.get("input") for block in whole["content"]] == [block.get("input") for block in made["content"]]
    assert whole["content"][0]["input"] == {"city": "Paris"}  # and yet the call is not whole
    with client.messages.stream(messages=WEATHER, tools=TOOLS, **ASKED | {"max_tokens": 12}) as stream:
        cut = stream.get_final_message()
    assert (cut.content[0].input, cut.stop_reason) == ({}, "max_tokens")


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    made = client.messages.create(messages=SUM, stop_sequences=["x", "2"], **ASKED)
    assert (said(made)[1], made.stop_reason, made.stop_sequence) == ("9", "stop_sequence", "2")


def test_an_assistants_message_at_the_end_is_continued(client: anthropic.Anthropic) -> None:
    assert said(client.messages.create(messages=[*SUM, {"role": "assistant", "content": "9"}], **ASKED))[1] == "2"


def test_thinking_that_is_omitted_is_an_empty_block(nano_server: Running) -> None:
    asked = {"messages": SUM, "max_tokens": 200, "temperature": 0}
    asked |= {"thinking": {"type": "adaptive", "display": "omitted"}}
    whole = nano_server.post("/v1/messages", asked).json()
    assert message(nano_server.post("/v1/messages", asked | {"stream": True}).text)["content"] == whole["content"]
    assert [block.get("thinking", block.get("text")) for block in whole["content"]] == ["", "92"]


def test_a_budget_that_leaves_no_room_is_cut_to_what_there_is(client: anthropic.Anthropic) -> None:
    asked = ASKED | {"max_tokens": 60, "thinking": {"type": "enabled", "budget_tokens": 59}}
    made = client.messages.create(messages=SUM, **asked)
    assert said(made)[1] and made.usage.output_tokens_details.thinking_tokens < 4


class Total(BaseModel):
    answer: int


def test_a_form_that_the_sdk_parses(client: anthropic.Anthropic) -> None:
    made = client.messages.parse(messages=SUM, output_format=Total, **ASKED)
    assert isinstance(made.parsed_output, Total)


@pytest.mark.parametrize("choice", ["auto", "none", "any", "tool"])
def test_a_choice_of_tools_holds(client: anthropic.Anthropic, choice: Any) -> None:
    asked = {"type": choice} | ({"name": "get_weather"} if choice == "tool" else {})
    made = client.messages.create(messages=WEATHER, tools=TOOLS, tool_choice=asked, **ASKED)
    calls = [block for block in made.content if block.type == "tool_use"]
    assert len(calls) == (choice != "none") == (made.stop_reason == "tool_use")
