"""A streamed answer adds up to the one that is not streamed, in all fields, whatever else runs."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai_stream import folded
from serving import Running

TOOLS = json.loads((Path(__file__).parents[2] / "examples" / "tools.json").read_text())
QUESTIONS = ("What is 34 + 58?", "What is the weather in Paris?", "What is the time in Rome?", "é 汉 🙂")
AT_ONCE = 4  # requests
SCHEMA = {"type": "object", "properties": {"sum": {"enum": [1, 22, 333]}}, "required": ["sum"]}


def request(seed: int, longest: int) -> dict[str, Any]:
    """A request that is drawn by chance, for an answer of so many tokens at most."""
    chance = random.Random(seed)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": chance.choice(QUESTIONS)}],
        "seed": seed,
        "max_tokens": chance.randint(1, longest),
        "n": chance.choice((1, 1, 1, 2)),
        "temperature": chance.choice((0, 0.7, 1.5)),
    }
    extras: list[dict[str, Any]] = [
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": chance.choice(("none", "required", "auto"))},
        {"tools": TOOLS, "parallel_tool_calls": False},
        {"logprobs": True, "top_logprobs": chance.choice((0, 2))},
        {"stop": ["9", "rain"]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"presence_penalty": 1.5, "top_k": 20, "top_p": 0.9},
    ]
    for extra in chance.sample(extras, 2):
        body |= extra
    if body.get("tool_choice") == "required":
        body.pop("response_format", None)  # the answer is calls
    thinking: list[dict[str, Any]] = [{"thinking_budget": 2, "max_tokens": 290}, {"enable_thinking": False}, {}]
    return body | chance.choices(thinking, (longest > 10, 10, 10))[0]


def answers(server: Running, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer as it comes whole, and as a stream adds up to it."""
    whole = server.post("/v1/chat/completions", body)
    stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    streamed = server.post("/v1/chat/completions", stream)
    assert (whole.status_code, streamed.status_code) == (200, 200), whole.text + streamed.text
    assert streamed.headers["content-type"].startswith("text/event-stream")
    found = {name: whole.json()[name] for name in ("choices", "usage")}
    return _told(found), _told(folded(streamed.text))


def _told(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the requests before."""
    del answer["usage"]["prompt_tokens_details"]
    return answer


def check(server: Running, seeds: range, longest: int) -> None:
    bodies = [request(seed, longest) for seed in seeds]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        pairs = list(pool.map(lambda body: answers(server, body), bodies))
    for body, (whole, streamed) in zip(bodies, pairs, strict=True):
        assert streamed == whole, body


def test_twenty_random_requests(nano_server: Running) -> None:
    check(nano_server, range(20), 6)


@pytest.mark.full
def test_two_hundred_random_requests(nano_server: Running) -> None:
    check(nano_server, range(1000, 1200), 60)
