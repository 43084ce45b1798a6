"""The SDKs that people use, against a real server: they get what `generate` gives with that seed.

Those of JavaScript run in node, from tests/server/node: npm install --prefix tests/server/node.
"""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
from serving import Running

from mlx_qwen35 import generate
from mlx_qwen35.engine.result import Result

NODE = Path(__file__).parent / "node"
TOOLS = json.loads((Path(__file__).parents[2] / "examples" / "tools.json").read_text())
SUM, WEATHER = "What is 34 + 58?", "What is the weather in Paris?"
REPORT = "It is 21 degrees and sunny in Paris."  # what nano makes of "21 degrees, sunny"


def asking(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}]


@pytest.fixture
def client(nano_server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{nano_server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def generated(server: Running, prompt: Any, **options: Any) -> Result:
    return generate(server.service.model, server.service.processor, prompt, **options)


# --- openai-python ----------------------------------------------------------------------------------------------------

# Fields of a request, and the options of generate that say the same.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "max_completion_tokens goes first": ({"max_completion_tokens": 2, "max_tokens": 9}, {"max_tokens": 2}),
    "stop": (
        {"stop": ["2"], "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"stop": ["2"], "enable_thinking": False},
    ),
    "logit_bias": (
        {"logit_bias": {"24": -100, "25": 5.5}, "reasoning_effort": "none", "max_tokens": 3},
        {"logit_bias": {24: -100, 25: 5.5}, "enable_thinking": False, "max_tokens": 3},
    ),
    "sampling": (
        {"temperature": 1.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": -0.5, "max_tokens": 6,
         "extra_body": {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}},
        {"temp": 1.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": -0.5, "max_tokens": 6, "top_k": 40,
         "min_p": 0.01, "repetition_penalty": 1.1},
    ),
    "choice": (
        {"extra_body": {"guided_choice": ["yes", "no"], "enable_thinking": False}},
        {"choice": ["yes", "no"], "enable_thinking": False},
    ),
    "regex": (
        {"extra_body": {"structured_outputs": {"regex": "[a-c]{5}"}, "enable_thinking": False}},
        {"regex": "[a-c]{5}", "enable_thinking": False},
    ),
}  # fmt: skip
LONGER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "seed alone": ({}, {}),
    "a budget": ({"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 2}}}, {"thinking_budget": 2}),
    "an effort": ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
    "a schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": {"enum": [7, 92]}}}},
        {"json_schema": {"enum": [7, 92]}},
    ),
    "no calls": ({"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS, "tool_choice": "none"}),
    "loops": ({"extra_body": {"loop_guard": True}}, {"loop_guard": True}),
}  # fmt: skip
CASES = [pytest.param(*case, id=name) for name, case in SAME.items()]
CASES += [pytest.param(*case, id=name, marks=pytest.mark.full) for name, case in LONGER.items()]


@pytest.mark.parametrize(("fields", "options"), CASES)
def test_fields_of_openai_python_are_the_options_of_generate(
    nano_server: Running, client: openai.OpenAI, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    right = generated(nano_server, asking(SUM), seed=7, **options)
    answer = client.chat.completions.create(model="gpt-4o", messages=asking(SUM), seed=7, **fields)
    (choice,) = answer.choices
    told = (choice.message.content, getattr(choice.message, "reasoning", ""), choice.finish_reason)
    assert told == (right.text, right.reasoning, right.finish_reason)
    assert answer.usage
    assert answer.usage.completion_tokens == right.generation_tokens
    assert answer.usage.completion_tokens_details.reasoning_tokens == right.reasoning_tokens


def test_openai_python_streams_the_text_of_generate(nano_server: Running, client: openai.OpenAI) -> None:
    right = generated(nano_server, asking(SUM), seed=11)
    content = reasoning = ""
    with client.chat.completions.create(model="nano", messages=asking(SUM), seed=11, stream=True) as stream:
        for chunk in stream:
            content += chunk.choices[0].delta.content or ""
            reasoning += getattr(chunk.choices[0].delta, "reasoning_content", "")
    assert (content, reasoning) == (right.text, right.reasoning)


def test_choice_i_of_n_has_seed_plus_i(nano_server: Running, client: openai.OpenAI) -> None:
    body: Any = {"model": "nano", "messages": asking("Tell me of the sea"), "temperature": 1.9, "max_tokens": 4}
    choices = client.chat.completions.create(**body, n=2, seed=4, reasoning_effort="none").choices
    options: Any = {"temp": 1.9, "max_tokens": 4, "enable_thinking": False}
    rights = [generated(nano_server, body["messages"], seed=seed, **options).text for seed in (4, 5)]
    assert [choice.message.content for choice in choices] == rights
    assert len(set(rights)) > 1  # they can be told apart


def test_logprobs_are_those_of_generate(nano_server: Running, client: openai.OpenAI) -> None:
    odd = nano_server.service.processor.tokenizer.encode("🙂")[0]  # part of a character
    options: Any = {"seed": 1, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    right = generated(nano_server, asking(SUM), logit_bias={odd: 40}, temp=1, **options).logprobs
    body = {"model": "nano", "messages": asking(SUM), "temperature": 1, "logit_bias": {str(odd): 40}} | options
    told = client.chat.completions.create(**body).choices[0].logprobs
    assert told and told.content and right and odd in {token.token for token in right}
    assert [(t.token, bytes(t.bytes or [])) for t in told.content] == [(t.text, t.bytes) for t in right]
    assert [t.logprob for t in told.content] == pytest.approx([t.logprob for t in right], abs=1e-4)
    for own, other in zip(told.content, right, strict=True):
        assert [bytes(top.bytes or []) for top in own.top_logprobs] == [top.bytes for top in other.top]


class Sum(pydantic.BaseModel):
    total: int = pydantic.Field(ge=0, le=99)


def test_openai_python_parses_an_answer(client: openai.OpenAI) -> None:
    body: Any = {"model": "nano", "messages": asking(SUM), "reasoning_effort": "none", "max_tokens": 40}
    message = client.chat.completions.parse(**body, response_format=Sum).choices[0].message
    assert isinstance(message.parsed, Sum)


def test_a_loop_of_calls_by_openai_python(client: openai.OpenAI) -> None:
    messages: list[Any] = asking(WEATHER)
    body: Any = {"model": "nano", "tools": TOOLS, "temperature": 0, "reasoning_effort": "none"}
    first = client.chat.completions.create(**body, messages=messages).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees, sunny"}]
    last = client.chat.completions.create(**body, messages=messages).choices[0]
    assert (last.message.content, last.finish_reason) == (REPORT, "stop")


def test_a_completion_is_what_generate_makes_of_raw_text(nano_server: Running, client: openai.OpenAI) -> None:
    text = "The sum of 34 and 58"
    right = generated(nano_server, text, ignore_chat_template=True, seed=5, max_tokens=6, logprobs=True, top_logprobs=2)
    tokens = nano_server.service.processor.tokenizer.encode(text)
    body: Any = {"model": "nano", "seed": 5, "max_tokens": 6, "logprobs": 2}
    answer = client.completions.create(**body, prompt=[text, text])
    assert [choice.text for choice in answer.choices] == [right.text] * 2
    assert answer.usage and answer.usage.prompt_tokens == 2 * len(tokens)
    logprobs = answer.choices[0].logprobs
    assert logprobs and right.logprobs
    assert logprobs.tokens == [token.text for token in right.logprobs]
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    with client.completions.create(**body, prompt=tokens, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == right.text


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


# --- pydantic-ai ------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_an_agent_of_pydantic_ai_calls_and_reports(nano_server: Running) -> None:
    from pydantic_ai import Agent  # takes its time
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    asked = []

    def get_weather(city: str) -> str:
        """Get the weather in a city"""
        asked.append(city)
        return "21 degrees, sunny"

    async def report() -> str:
        async with openai.AsyncOpenAI(base_url=f"{nano_server.url}/v1", api_key="none") as client:
            model = OpenAIChatModel("nano", provider=OpenAIProvider(openai_client=client))
            agent = Agent(model, tools=[get_weather], model_settings={"temperature": 0})
            return (await agent.run(WEATHER)).output

    assert (asyncio.run(report()), asked) == (REPORT, ["Paris"])


# --- node -------------------------------------------------------------------------------------------------------------


def in_node(script: str, package: str, server: Running) -> dict[str, Any]:
    """What a script of tests/server/node tells of its SDK."""
    if not (node := shutil.which("node")) or not (NODE / "node_modules" / package).is_dir():
        pytest.skip(f"{package} is not there: node, and npm install --prefix tests/server/node")
    given = {"model": "gpt-4o", "sum": SUM, "weather": WEATHER, "tools": TOOLS, "seed": 7}
    run = [node, str(NODE / script), server.url, json.dumps(given)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.full
def test_openai_node_gets_the_text_of_generate_and_ends_calls(nano_server: Running) -> None:
    told = in_node("openai.mjs", "openai", nano_server)
    right = generated(nano_server, asking(SUM), seed=7)
    for choice in (told["whole"], told["text"]):
        assert (choice["message"]["content"], choice["finish_reason"]) == (right.text, right.finish_reason)
    assert told["whole"]["message"]["reasoning_content"] == right.reasoning
    (call,) = told["call"]["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Paris"})
    assert (told["asked"], told["report"]) == ([["get_weather", {"city": "Paris"}]], REPORT)
    assert told["refused"] == {"status": 400, "param": "n", "code": "invalid_value", "type": "invalid_request_error"}


@pytest.mark.full
def test_the_ai_sdk_gets_the_text_of_generate_and_loops(nano_server: Running) -> None:
    told = in_node("ai_sdk.mjs", "ai", nano_server)
    right = generated(nano_server, asking(SUM), seed=7)
    for answer in (told["whole"], told["streamed"]):
        assert (answer["text"], answer["reasoning"], answer["finish"]) == (right.text, right.reasoning, "stop")
    assert told["streamed"]["usage"]["outputTokens"] == right.generation_tokens
    assert (told["asked"], told["report"]) == ([["get_weather", {"city": "Paris"}]], REPORT)
    assert (told["finishes"], told["errors"]) == (["tool-calls", "stop"], [])
