"""POST /v1/responses over a real socket, by OpenAI's SDK and as Codex asks."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from random import Random
from typing import Any

import openai
import pytest
from block_streams import events, response
from PIL import Image
from pydantic import BaseModel
from serving import CLIENT, Running

from mlx_qwen35 import generate
from mlx_qwen35.prompt.piece import CONTENT, Piece
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import Fields
from mlx_qwen35.server.responses import ResponseReply
from mlx_qwen35.server.responses_request import conversation, options
from mlx_qwen35.server.service import Event

Json = dict[str, Any]
SUM = "What is 34 + 58?"
WEATHER = "What is the weather in Paris?"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Get the weather in a city", "parameters": CITY}
TOOLS = [{"type": "function", "strict": False, **FUNCTION}]
ASKED: Json = {"model": "any", "temperature": 0}
CARRIED = {"include": ["reasoning.encrypted_content"]}
MODES: dict[str, Json] = {
    "at once": {"reasoning": {"effort": "none"}},
    "thinking": {"reasoning": {"effort": "high"}},
    "summed up": {"reasoning": {"effort": "low", "summary": "auto"}, **CARRIED},
}


@pytest.fixture(scope="module")
def client(nano_server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{nano_server.url}/v1", api_key="key", max_retries=0) as made:
        yield made


def image(color: str) -> Json:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_image", "detail": "auto", "image_url": f"data:image/png;base64,{data}"}


def thought(made: Any) -> str:
    items = [item for item in made.output if item.type == "reasoning"]
    return "".join(part.text for item in items for part in item.summary + item.content)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [pytest.param("at once", marks=pytest.mark.full), "thinking", "summed up"])
def test_the_text_is_that_of_generate_with_that_seed(nano_server: Running, client: openai.OpenAI, mode: str) -> None:
    service, own = nano_server.service, {"temp": 0.9, "seed": 7, "max_tokens": 400}
    result = generate(service.model, service.processor, SUM, **own, enable_thinking=mode != "at once")
    given = {"model": "any", "input": SUM, "max_output_tokens": 400, "temperature": 0.9, **MODES[mode]}
    whole = client.responses.create(**given, extra_body={"seed": 7})
    with client.responses.stream(**given, extra_body={"seed": 7}) as stream:
        streamed = stream.get_final_response()
    assert [(thought(made), made.output_text) for made in (whole, streamed)] == [(result.reasoning, result.text)] * 2
    assert whole.usage.input_tokens == result.prompt_tokens and whole.usage.output_tokens == result.generation_tokens
    assert whole.usage.output_tokens_details.reasoning_tokens == streamed.usage.output_tokens_details.reasoning_tokens
    assert bool(result.reasoning) == (mode != "at once") and whole.status == "completed" and whole.model == "nano"


@pytest.mark.parametrize("mode", ["thinking", pytest.param("summed up", marks=pytest.mark.full)])
def test_a_tool_loop_ends_in_an_answer(client: openai.OpenAI, mode: str) -> None:
    given: list[Any] = [{"role": "user", "content": WEATHER}]
    with client.responses.stream(input=given, tools=TOOLS, **MODES[mode], **ASKED) as stream:
        turn = stream.get_final_response()
    call = turn.output[-1]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    given += [item.model_dump(exclude_none=True) for item in turn.output]
    given.append({"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees, sunny"})
    answer = client.responses.create(input=given, tools=TOOLS, **MODES[mode], **ASKED)
    assert answer.output_text == "It is 21 degrees and sunny in Paris."
    assert answer.usage.input_tokens_details.cached_tokens > turn.usage.input_tokens * 0.9


def test_images_are_seen_in_a_message_and_in_a_result(client: openai.OpenAI) -> None:
    parts = [image("red"), {"type": "input_text", "text": "What color is the image?"}]
    asked: list[Any] = [{"role": "user", "content": parts}]
    assert client.responses.create(input=asked, **MODES["at once"], **ASKED).output_text == "red"
    call = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": '{"city": "Paris"}'}
    result = {"type": "function_call_output", "call_id": "c", "output": [image("blue")]}
    asked = [{"role": "user", "content": WEATHER}, call, result]
    assert "blue" in client.responses.create(input=asked, tools=TOOLS, **MODES["at once"], **ASKED).output_text


class Total(BaseModel):
    answer: int


def test_a_form_that_the_sdk_parses(client: openai.OpenAI) -> None:
    made = client.responses.parse(input=SUM, text_format=Total, **MODES["at once"], **ASKED)
    assert isinstance(made.output_parsed, Total)


def test_a_call_that_is_cut_leaves_the_response_incomplete(nano_server: Running) -> None:
    asked = {"input": WEATHER, "tools": TOOLS, "max_output_tokens": 14, **MODES["at once"], **ASKED}
    whole = nano_server.post("/v1/responses", asked).json()
    made = response(nano_server.post("/v1/responses", asked | {"stream": True}).text)
    for found in (whole, made):
        assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        (call,) = found["output"]
        assert (call["status"], call["arguments"]) == ("incomplete", '{"city": "Paris"')


# --- what a request means ---------------------------------------------------------------------------------------------

CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
OWN_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def reasoning(**more: Any) -> Json:
    return {"type": "reasoning", "id": "rs_1", "summary": [], **more}


HISTORIES: dict[str, tuple[Json, list[Json]]] = {
    "text with instructions": (
        {"input": "Hi", "instructions": "Be brief."},
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    ),
    "an assistant's items are one message": (
        {"input": [
            reasoning(content=[{"type": "reasoning_text", "text": "Hm."}]),
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {**CALL, "status": "completed"},
            {"type": "function_call_output", "call_id": "c1", "output": "21"},
        ]},
        [{"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [OWN_CALL]},
         {"role": "tool", "tool_call_id": "c1", "content": "21"}],
    ),
    "reasoning that a client carries goes before its summary": (
        {"input": [reasoning(summary=[{"type": "summary_text", "text": "short"}], encrypted_content="plain:whole")]},
        [{"role": "assistant", "content": "", "reasoning_content": "whole"}],
    ),
    "another server's secret is none of ours": (
        {"input": [reasoning(summary=[{"type": "summary_text", "text": "short"}], encrypted_content="gAAAA")]},
        [{"role": "assistant", "content": "", "reasoning_content": "short"}],
    ),
    "roles and parts": (
        {"input": [{"role": "developer", "content": "Be kind."},
                   {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
        [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_is_read(nano_server: Running, name: str) -> None:
    given, expected = HISTORIES[name]
    assert conversation(Fields(given), nano_server.service) == expected


OWN_TOOL = {"type": "function", "function": FUNCTION}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
MEANINGS: list[tuple[Json, Json]] = [
    ({}, {}),
    ({"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 9, "seed": 5},
     {"temp": 0.5, "top_p": 0.9, "max_tokens": 9, "seed": 5}),
    ({"reasoning": {"effort": "xhigh"}}, {"reasoning_effort": "high"}),
    ({"reasoning": {"effort": "none", "summary": "auto"}}, {"enable_thinking": False}),
    ({"reasoning": {"context": "all_turns"}}, {"preserve_thinking": True}),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}, {"json_schema": SCHEMA}),
    ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {}),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "get_weather"}, "parallel_tool_calls": False},
     {"tools": [OWN_TOOL], "tool_choice": "get_weather", "parallel_tool_calls": False}),
    ({"store": True, "metadata": {"a": "b"}, "prompt_cache_key": "k", "client_metadata": {}, "truncation": "disabled",
      "include": ["file_search_call.results", "reasoning.encrypted_content"], "service_tier": "auto", "user": "u"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "meant"), MEANINGS)
def test_fields_are_options_of_generate(nano_server: Running, given: Json, meant: Json) -> None:
    assert options(Fields({"model": "any", **given}), nano_server.service) == meant


OTHERS = [{"type": kind} for kind in ("web_search_2025_08_26", "local_shell", "image_generation", "mcp")]
OTHERS += [{"type": "custom", "name": "apply_patch"}, {"type": "namespace", "name": "agents", "tools": TOOLS}]


def test_tools_that_are_no_functions_are_left_out_and_told(
    nano_server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {
        "input": WEATHER,
        "tools": [{"type": "computer"}, *TOOLS, *OTHERS, {"type": "computer_use_preview"}],
        "max_output_tokens": 1,
    }
    first, _ = (nano_server.post("/v1/responses", asked).json() for _ in range(2))
    alone = nano_server.post("/v1/responses", asked | {"tools": TOOLS}).json()
    assert first["tools"] == TOOLS and first["usage"]["input_tokens"] == alone["usage"]["input_tokens"]
    assert sum("computer" in line.getMessage() for line in caplog.records) == 1
    none = nano_server.post("/v1/responses", asked | {"tools": OTHERS})
    assert none.status_code == 200 and none.json()["tools"] == []


def user(*parts: Json) -> Json:
    return {"input": [{"role": "user", "content": list(parts)}]}


BAD: list[tuple[str, Json]] = [
    ("input", {"input": None}),
    ("input", {"input": []}),
    ("input", {"input": [{"role": "user", "content": "Hi"}] * 4097}),
    ("n", {"n": 2}),
    ("stop", {"stop": ["a"]}),
    ("max_tokens", {"max_tokens": 5}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("input.0.type", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
    ("input.0.role", {"input": [{"role": "tool", "content": "Hi"}]}),
    ("input.0.content", {"input": [{"role": "user", "content": 5}]}),
    ("input.0.content.0.file_id", user({"type": "input_file", "file_id": "f"})),
    ("input.0.content.0.file_data", user({"type": "input_file", "file_data": "/etc/passwd"})),
    ("input.0.content.0.file_url", user({"type": "input_file", "file_url": "http://127.0.0.1/a.pdf"})),
    ("input.0.content.0.file_id", user({"type": "input_image", "file_id": "f"})),
    ("input.0.content.0.image_url", user({"type": "input_image", "image_url": "/etc/passwd"})),
    ("input.0.content.0.detail", user({**image("red"), "detail": "most"})),
    ("input.0.arguments", {"input": [{**CALL, "arguments": {}}]}),
    ("input", {"input": [{"type": "function_call_output", "call_id": "c9", "output": "21"}]}),
    ("input.0.call_id", {"input": [{"type": "function_call_output", "output": "21"}]}),
    ("max_output_tokens", {"max_output_tokens": 0}),
    ("temperature", {"temperature": 3}),
    ("top_p", {"top_p": 0}),
    ("instructions", {"instructions": ["Be brief."]}),
    ("tools.0.type", {"tools": [{"type": "functions", **FUNCTION}]}),
    ("tool_choice", {"tools": [{"type": "web_search"}], "tool_choice": "required"}),
    ("tool_choice.type", {"tools": OTHERS, "tool_choice": {"type": "custom", "name": "apply_patch"}}),
    ("tools.0.name", {"tools": [{"type": "function", "parameters": {}}]}),
    ("tools", {"tools": [*TOOLS, *TOOLS]}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": "always"}),
    ("tool_choice.type", {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}),
    ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "n"}}}),
    ("text.verbosity", {"text": {"verbosity": "low"}}),
    ("reasoning.effort", {"reasoning": {"effort": "much"}}),
    ("reasoning.mode", {"reasoning": {"mode": "pro"}}),
    ("previous_response_id", {"previous_response_id": "resp_1"}),
    ("conversation", {"conversation": "conv_1"}),
    ("background", {"background": True}),
    ("prompt", {"prompt": {"id": "p"}}),
    ("truncation", {"truncation": "auto"}),
    ("include.0", {"include": ["message.output_text.logprobs"]}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("max_tool_calls", {"max_tool_calls": 2}),
    ("stream", {"stream": 1}),
]


@pytest.mark.parametrize(("place", "given"), BAD)
def test_a_bad_request_is_refused_by_its_field(nano_server: Running, place: str, given: Json) -> None:
    answer = nano_server.post("/v1/responses", {"model": "any", "input": "Hi", **given})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", place)
    assert error["message"] and error["code"]


# --- Codex ------------------------------------------------------------------------------------------------------------


def test_a_session_of_codex_goes_on_by_what_it_sends_back(nano_server: Running) -> None:
    """It sends all items again, of reasoning the summary and what it carries."""
    history: list[Json] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "You may use tools."}]},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "What is the weather in Oslo?"}],
        },
    ]
    cached = []
    for _ in range(2):
        asked = {
            "model": "gpt-5-codex", "instructions": "You help in a terminal.", "input": history, "tools": TOOLS,
            "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False, "stream": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "session",
            "client_metadata": {"x": "y"}, "temperature": 0,
        }  # fmt: skip
        made = response(nano_server.post("/v1/responses", asked).text)
        assert made["status"] == "completed" and made["store"] is False
        cached.append(made["usage"]["input_tokens_details"]["cached_tokens"] / made["usage"]["input_tokens"])
        for item in made["output"]:
            assert item["type"] != "reasoning" or item["encrypted_content"] == f"plain:{item['summary'][0]['text']}"
            left_out = {"id", "status"} | ({"content"} if item["type"] == "reasoning" else set())
            history.append({name: value for name, value in item.items() if name not in left_out})
        calls = [item for item in made["output"] if item["type"] == "function_call"]
        output = {"type": "function_call_output", "output": "4 degrees, rainy"}
        history += [{**output, "call_id": call["call_id"]} for call in calls]
    assert calls == [] and cached[1] > 0.6


# --- streams ----------------------------------------------------------------------------------------------------------

PROMPTS = [SUM, WEATHER, "What time is it in Tokyo?", "Sort: 5 3 9"]


def drawn(seed: int) -> Json:
    """A request, of any mode."""
    rng = Random(seed)
    asked: Json = {"input": rng.choice(PROMPTS), "max_output_tokens": rng.choice([1, 4, 9, 13, 14, 30, 60])}
    asked |= {"temperature": rng.choice([0, 0.7, 1.5]), "seed": seed, **rng.choice(list(MODES.values()))}
    return asked | ({"tools": TOOLS} if rng.random() < 0.5 else {})


def named(made: Json) -> Json:
    """A response with the names that are equal in every one, and without what a second one has not read again."""
    own = made["id"].removeprefix("resp_")
    made["usage"]["input_tokens_details"].pop("cached_tokens")
    return json.loads(json.dumps(made).replace(own, "")) | {"created_at": 0}


def compare(nano_server: Running, seed: int) -> None:
    asked = drawn(seed)
    whole = nano_server.post("/v1/responses", asked).json()
    assert named(response(nano_server.post("/v1/responses", asked | {"stream": True}).text)) == named(whole)


@pytest.mark.parametrize("seed", range(3))
def test_streamed_is_unstreamed(nano_server: Running, seed: int) -> None:
    compare(nano_server, seed)


@pytest.mark.full
def test_streamed_is_unstreamed_200_times(nano_server: Running) -> None:
    for seed in range(3, 203):
        compare(nano_server, seed)


async def told(answer: AsyncIterator[Event], silence: float = 60) -> AsyncIterator[Json]:
    async for event in ResponseReply("nano", Fields({"input": "Hi"})).events(answer, silence):
        for found in events(event):
            yield found


def test_a_stream_says_that_it_goes_on_while_the_model_is_silent() -> None:
    """The model says a word behind the third. A comment would not keep Codex waiting."""

    async def run() -> list[str]:
        third, kinds = asyncio.Event(), []

        async def answer() -> AsyncIterator[Event]:
            await third.wait()
            yield Event(0, [Piece("Hi", CONTENT)])

        async for event in told(answer(), silence=0.001):
            kinds.append(event["type"])
            if kinds.count("response.in_progress") == 3:
                third.set()
        return kinds

    kinds = asyncio.run(run())
    assert kinds[:4] == ["response.created", *["response.in_progress"] * 3]
    assert kinds[-1] == "response.output_text.delta"


def test_a_stream_begins_before_the_model_does(nano_server: Running) -> None:
    go = threading.Event()
    nano_server.service.do(go.wait)
    asked = {"input": SUM, "stream": True, "max_output_tokens": 8}
    try:
        with CLIENT.stream("POST", f"{nano_server.url}/v1/responses", json=asked) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("event"))
            assert [next(lines), next(lines)] == ["event: response.created", "event: response.in_progress"]
            go.set()
            assert [*lines][-1] == "event: response.incomplete"
    finally:
        go.set()


@pytest.mark.parametrize(
    ("error", "code"),
    [(ApiError(503, "closing", "the server is closing"), "server_error"), (KeyError("secret"), "server_error"),
     (ApiError(400, "invalid_value", "wrong"), "invalid_prompt")],
)  # fmt: skip
def test_a_failure_inside_a_stream_is_its_last_event(error: Exception, code: str) -> None:
    async def answer() -> AsyncIterator[Event]:
        yield Event(0, [Piece("Hi", CONTENT)])
        raise error

    async def run() -> list[Json]:
        return [event async for event in told(answer())]

    last = asyncio.run(run())[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == code
    assert "secret" not in json.dumps(last)
