"""POST /v1/messages and count_tokens over a real socket, by Anthropic's SDK and as Claude Code asks."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import anthropic
import pytest
from block_streams import events, message
from PIL import Image
from pydantic import BaseModel
from serving import CLIENT, Running

from mlx_qwen35 import generate
from mlx_qwen35.prompt.piece import CONTENT, Piece
from mlx_qwen35.prompt.tool_calls import Cut
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import Fields
from mlx_qwen35.server.messages import MessageReply, ending
from mlx_qwen35.server.messages_request import UNREAD, conversation, options
from mlx_qwen35.server.service import Event, Job

Json = dict[str, Any]
SUM = [{"role": "user", "content": "What is 34 + 58?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "get_weather", "description": "Get the weather in a city", "input_schema": CITY}]
ASKED: Json = {"model": "any", "max_tokens": 200, "extra_body": {"temperature": 0}}
CUT = Cut("get_weather", {}, {})
MODES = [{}, {"thinking": {"type": "adaptive"}}]


@pytest.fixture(scope="module")
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
    thinking, words = ("".join(getattr(block, kind, "") for block in made.content) for kind in ("thinking", "text"))
    return thinking, words


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
    assert whole.usage.input_tokens + whole.usage.cache_read_input_tokens == result.prompt_tokens
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


def test_the_sdk_lists_the_model(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list()
    assert (model.id, model.display_name, model.type) == ("nano", "nano", "model")
    assert model == client.models.retrieve("nano") and model.created_at.tzinfo


def test_the_sdks_tool_runner_goes_on_without_a_thread(client: anthropic.Anthropic) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city"""
        return "21 degrees, sunny"

    runner = client.beta.messages.tool_runner(messages=WEATHER, tools=[get_weather], **MODES[1], **ASKED)
    assert [turn.stop_reason for turn in runner] == ["tool_use", "end_turn"]


def test_images_are_seen_in_a_message_and_in_a_result(client: anthropic.Anthropic) -> None:
    asked = [{"role": "user", "content": [image("red"), {"type": "text", "text": "What color is the image?"}]}]
    assert said(client.messages.create(messages=asked, **ASKED))[1] == "red"
    call = {"type": "tool_use", "id": "c", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": [image("blue")]}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=WEATHER + turns, tools=TOOLS, **ASKED)
    assert "blue" in said(answer)[1]


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
    for most in (12, 14):  # inside the argument, and the closing tags
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


@pytest.mark.parametrize(
    ("end", "reason"),
    [({"finish_reason": "stop"}, "end_turn"), ({"finish_reason": "tool_calls"}, "tool_use"),
     ({"finish_reason": "stop", "stop": "x"}, "stop_sequence"), ({"finish_reason": "length"}, "max_tokens"),
     ({"finish_reason": "length", "limited_by": "context"}, "model_context_window_exceeded"),
     ({"finish_reason": "length", "limited_by": "context", "cut": CUT}, "max_tokens"),
     ({"finish_reason": "tool_calls", "cut": CUT}, "max_tokens"),
     ({"finish_reason": "stop", "cut": CUT}, "max_tokens")],
)  # fmt: skip
def test_why_an_answer_ended(nano_server: Running, end: Json, reason: str) -> None:
    service = nano_server.service
    result = generate(service.model, service.processor, SUM, temp=0, max_tokens=1)
    assert ending(replace(result, **end))["stop_reason"] == reason


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


# --- what a request means ---------------------------------------------------------------------------------------------

USER = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
CALL = {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}
OWN_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def text(words: str, **more: Any) -> Json:
    return {"type": "text", "text": words, **more}


HISTORIES: dict[str, tuple[Json, list[Json]]] = {
    "a system prompt in blocks": (
        {"system": [text("Be brief.", cache_control={"type": "ephemeral"}), text("Be kind.")]},
        [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}],
    ),
    "the billing line alone goes": (
        {"system": [text("x-anthropic-billing-header: cch=1;\nkept"), text("No x-anthropic-billing-header")]},
        [{"role": "system", "content": "kept"}, {"role": "system", "content": "No x-anthropic-billing-header"}],
    ),
    "a call, its results where they stand": (
        {"messages": [
            {"role": "assistant", "content": [text("I "), text("look."), CALL]},
            {"role": "user", "content": [
                text("here:"), {"type": "tool_result", "tool_use_id": "c1", "content": [text("21")]}, text("and?"),
            ]},
        ]},
        [{"role": "assistant", "content": "I look.", "tool_calls": [OWN_CALL]},
         {"role": "user", "content": [text("here:")]},
         {"role": "tool", "tool_call_id": "c1", "content": [text("21")]},
         {"role": "user", "content": [text("and?")]}],
    ),
    "a result that is an error, and one without content": (
        {"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "no such city", "is_error": True},
            {"type": "tool_result", "tool_use_id": "c2"},
        ]}]},
        [{"role": "tool", "tool_call_id": "c1", "content": [text("Error: "), text("no such city")]},
         {"role": "tool", "tool_call_id": "c2", "content": [text("")]}],
    ),
    "thinking is kept, redacted thinking is not": (
        {"messages": [{"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"}, {"type": "redacted_thinking", "data": "xyz"},
            text("Yes"),
        ]}]},
        [{"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_is_read(nano_server: Running, name: str) -> None:
    given, expected = HISTORIES[name]
    found = conversation(Fields({"messages": [USER], **given}), nano_server.service)
    assert found == expected + ([] if "messages" in given else [USER])


FUNCTION = {"name": "get_weather", "description": "Get the weather in a city", "parameters": CITY}
OWN_TOOL = {"type": "function", "function": FUNCTION}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
MEANINGS: list[tuple[Json, Json]] = [
    ({}, {"enable_thinking": False}),
    ({"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 5}, {"temp": 0.5, "top_p": 0.9, "top_k": 3, "seed": 5}),
    ({"stop_sequences": ["a", "b"]}, {"stop": ["a", "b"]}),
    ({"thinking": {"type": "enabled", "budget_tokens": 50}}, {"thinking_budget": 50, "enable_thinking": None}),
    ({"thinking": {"type": "adaptive"}}, {"reasoning_effort": "high", "enable_thinking": None}),
    ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, {"enable_thinking": False}),
    ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high", "enable_thinking": None}),
    ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, {"json_schema": SCHEMA}),
    ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, {"json_schema": SCHEMA}),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "get_weather"}},
     {"tools": [OWN_TOOL], "tool_choice": "get_weather", "parallel_tool_calls": True}),
    ({"tools": [{**TOOLS[0], "type": "custom", "strict": True, "cache_control": {"type": "ephemeral"}}],
      "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
     {"tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}], "tool_choice": "required",
      "parallel_tool_calls": False}),
    ({"metadata": {"user_id": "u"}, "service_tier": "auto", "speed": "standard",
      "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "meant"), MEANINGS)
def test_fields_are_options_of_generate(nano_server: Running, given: Json, meant: Json) -> None:
    body = {"model": "any", "max_tokens": 100, "messages": [USER], **given}
    expected = {name: value for name, value in ({"enable_thinking": False} | meant).items() if value is not None}
    fields = Fields(body)
    fields.ignore("messages", "max_tokens")  # which were read before
    assert options(fields, nano_server.service) == expected


def tool(**more: Any) -> Json:
    return {"tools": [{**TOOLS[0], **more}]}


def user(*blocks: Json) -> Json:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


PDF = {"type": "base64", "media_type": "application/pdf", "data": "aGk="}


def test_documents_of_text_are_read_and_those_of_results_end_no_conversation(nano_server: Running) -> None:
    plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "abc"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [plain, {"type": "document", "source": PDF}]}
    parts = [message["content"] for message in conversation(Fields(user(plain, result)), nano_server.service)]
    assert parts == [[text("T\n\nabc")], [text("T\n\nabc"), text(UNREAD)]]


BAD: list[tuple[str, Json]] = [
    ("max_tokens", {"max_tokens": None}),
    ("max_tokens", {"max_tokens": 0}),
    ("messages", {"messages": []}),
    ("messages", user()),
    ("messages", {"messages": SUM * 4097}),
    ("messages", {"messages": "Hi"}),
    ("messages.0.role", {"messages": [{"role": "tool", "content": "Hi"}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages.0.content.0.source.type", user({"type": "document", "source": {"type": "file", "file_id": "f"}})),
    ("messages.0.content.0.source.data", user({"type": "document", "source": PDF})),
    ("messages.0.content.1.text", user(text("Hi"), {"type": "text"})),
    ("messages.0.content.0.source.type", user({"type": "image", "source": {"type": "file", "file_id": "f"}})),
    ("messages.0.content.0.source.media_type",
     user({"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": ""}})),
    ("messages.0.content.0.source.data",
     user({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}})),
    ("messages.0.content.0.source.url",
     user({"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}})),
    ("messages.0.content.0.tool_use_id", user({"type": "tool_result", "content": "21"})),
    ("tool_use_id", user({"type": "tool_result", "tool_use_id": "c9", "content": "21"})),
    ("messages.0.content.0.input", {"messages": [{"role": "assistant", "content": [CALL | {"input": "{}"}]}]}),
    ("system.0.type", {"system": [image("red")]}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": 2.5}),
    ("top_k", {"top_k": -3}),
    ("stop_sequences", {"stop_sequences": [""]}),
    ("stop_sequences", {"stop_sequences": ["a"] * 17}),
    ("stream", {"stream": "yes"}),
    ("tools.0.type", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    ("tools.0.input_schema", tool(input_schema=None)),
    ("tools.0.defer_loading", tool(defer_loading=True)),
    ("tools", {"tools": TOOLS * 2}),
    ("tool_choice.type", {**tool(), "tool_choice": {"type": "required"}}),
    ("tool_choice.name", {**tool(), "tool_choice": {"type": "tool", "name": "g"}}),
    ("tool_choice", {"tool_choice": {"type": "any"}}),
    ("thinking.type", {"thinking": {"type": "between_tools"}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled"}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 100}}),
    ("output_config.effort", {"output_config": {"effort": "minimal"}}),
    ("output_config.format.schema", {"output_config": {"format": {"type": "json_schema"}}}),
    ("mcp_servers", {"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}),
    ("container", {"container": "c"}),
    ("n", {"n": 2}),
    ("stop", {"stop": ["a"]}),
    ("reasoning_effort", {"reasoning_effort": "high"}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"enable_thinking": True}}),
    ("min_tokens", {"min_tokens": 5}),
    ("audio", {"audio": {}}),
    ("speed", {"speed": "fast"}),
    ("context_management.edits.0.type", {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}),
]  # fmt: skip


@pytest.mark.parametrize(("place", "given"), BAD)
def test_a_bad_request_is_refused_in_anthropics_shape(nano_server: Running, place: str, given: Json) -> None:
    answer = nano_server.post("/v1/messages", {"model": "any", "max_tokens": 100, "messages": SUM, **given})
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert place in body["error"]["message"]
    assert body["request_id"] == answer.headers["request-id"] != ""


# --- Claude Code ------------------------------------------------------------------------------------------------------


def test_a_session_of_claude_code_reads_its_prompt_once(nano_server: Running) -> None:
    """Its first system block is another one in each request."""
    messages: list[Json] = [{"role": "user", "content": [text("What is the weather in Oslo?")]}]
    usages = []
    for turn in range(3):
        asked = {
            "model": "claude-opus-4-5", "max_tokens": 32000, "temperature": 0, "stream": True,
            "system": [text(f"x-anthropic-billing-header: cc_version=2.1.0; cc_entrypoint=cli; cch={turn};"),
                       text("You help in a terminal.", cache_control={"type": "ephemeral"})],
            "messages": messages, "tools": TOOLS, "metadata": {"user_id": "u"},
            "thinking": {"type": "enabled", "budget_tokens": 31999},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        }  # fmt: skip
        counted = nano_server.post("/v1/messages/count_tokens?beta=true", asked).json()["input_tokens"]
        made = message(nano_server.post("/v1/messages?beta=true", asked).text)
        usages.append(made["usage"])
        assert counted == usages[-1]["input_tokens"] + usages[-1]["cache_read_input_tokens"]
        messages.append({"role": "assistant", "content": made["content"]})
        calls = [block for block in made["content"] if block["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": call["id"], "content": "4 degrees, rainy"} for call in calls]
        messages.append({"role": "user", "content": results or [text("What is the weather in Oslo?")]})
    assert [usage["input_tokens"] < 0.6 * usage["cache_read_input_tokens"] for usage in usages] == [False, True, True]


# --- streams ----------------------------------------------------------------------------------------------------------

PROMPTS = ["What is 34 + 58?", "What is the weather in Paris?", "What time is it in Tokyo?", "Sort: 5 3 9"]


def drawn(seed: int) -> Json:
    """A request, of any mode."""
    rng = Random(seed)
    asked: Json = {
        "messages": [{"role": "user", "content": rng.choice(PROMPTS)}],
        "max_tokens": rng.choice([1, 4, 9, 12, 13, 30, 60]),
        "temperature": rng.choice([0, 0.7, 1.5]),
        "seed": seed,
    }
    more: list[Json] = [
        {"thinking": {"type": "adaptive"}}, {"tools": TOOLS}, {"stop_sequences": ["i", "2"]}, {"system": "Be brief."}
    ]  # fmt: skip
    return asked | {name: value for part in more if rng.random() < 0.5 for name, value in part.items()}


def compare(nano_server: Running, seed: int) -> None:
    """Streamed equals unstreamed, but for the name of the message and what the second has not read again."""
    asked = drawn(seed)
    whole = nano_server.post("/v1/messages", asked).json()
    made = message(nano_server.post("/v1/messages", asked | {"stream": True}).text)
    for usage in (whole["usage"], made["usage"]):
        usage["input_tokens"] += usage.pop("cache_read_input_tokens")
    assert made | {"id": whole["id"]} == whole


@pytest.mark.parametrize("seed", range(3))
def test_streamed_is_unstreamed(nano_server: Running, seed: int) -> None:
    compare(nano_server, seed)


@pytest.mark.full
def test_streamed_is_unstreamed_200_times(nano_server: Running) -> None:
    for seed in range(3, 203):
        compare(nano_server, seed)


async def told(answer: AsyncIterator[Event], silence: float = 60) -> AsyncIterator[Json]:
    async for event in MessageReply("nano", 5).events(answer, silence):
        for found in events(event):
            yield found


def test_a_stream_pings_while_the_model_is_silent() -> None:
    """The model says a word behind the third ping."""

    async def run() -> list[str]:
        third, kinds = asyncio.Event(), []

        async def answer() -> AsyncIterator[Event]:
            await third.wait()
            yield Event(0, [Piece("Hi", CONTENT)])

        async for event in told(answer(), silence=0.001):
            kinds.append(event["type"])
            if kinds.count("ping") == 3:
                third.set()
        return kinds

    kinds = asyncio.run(run())
    assert kinds[:4] == ["message_start", "ping", "ping", "ping"]
    assert kinds[-2:] == ["content_block_start", "content_block_delta"]


def test_a_stream_begins_before_the_model_does(nano_server: Running) -> None:
    go = threading.Event()
    nano_server.service.do(go.wait)
    asked = {"max_tokens": 8, "messages": SUM, "stream": True}
    try:
        with CLIENT.stream("POST", f"{nano_server.url}/v1/messages", json=asked) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("event"))
            assert [next(lines), next(lines)] == ["event: message_start", "event: ping"]
            go.set()
            assert [*lines][-1] == "event: message_stop"
    finally:
        go.set()


def test_a_client_that_leaves_at_the_first_event_ends_the_answer() -> None:
    left = []

    class Waiting:
        """An answer that never comes."""

        async def __aiter__(self) -> AsyncIterator[Event]:
            await asyncio.Event().wait()
            yield Event(0)

        def cancel(self) -> None:
            left.append(True)

    async def run() -> None:
        service = SimpleNamespace(submit=lambda job: Waiting())
        request: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(service=service)))
        response: Any = await MessageReply("nano", 5).answer(request, Job([], {}, 0.0), stream=True)
        assert "message_start" in await anext(response.body_iterator)
        await response.body_iterator.aclose()

    asyncio.run(run())
    assert left


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ApiError(503, "closing", "the server is closing"), "overloaded_error"), (KeyError("secret"), "api_error")],
)
def test_a_failure_inside_a_stream_is_its_last_event(error: Exception, kind: str) -> None:
    async def answer() -> AsyncIterator[Event]:
        yield Event(0, [Piece("Hi", CONTENT)])
        raise error

    async def run() -> list[Json]:
        return [event async for event in told(answer())]

    last = asyncio.run(run())[-1]
    assert (last["type"], last["error"]["type"]) == ("error", kind)
    assert "secret" not in json.dumps(last)
