"""Prompts that share what they begin with, over the API: what is read, and where one parts from another."""

import base64
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from engine.agent_session import requests, tools
from serving import Running

from mlx_qwen35.cache.prefix import QUERY, TURN, PrefixLibrary
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.load import load
from mlx_qwen35.server.report import MUCH, Parted, parted

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
LONG = " ".join(f"word{i} is number {i * 7 % 31}." for i in range(60))  # more than MUCH tokens


def asked(server: Running, messages: list, **fields) -> dict:
    """The usage of a request."""
    body = {"messages": messages, "max_tokens": 1, "temperature": 0} | fields
    answer = server.post("/v1/chat/completions", body).json()
    return answer["usage"]


def cached(usage: dict) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def server(nano_server: Running) -> Running:
    """A server that knows no prompt."""
    nano_server.service.library.clear()
    return nano_server


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture):
    """What the log says of prompts that part."""
    caplog.set_level(logging.INFO, "mlx_qwen35.server")
    return lambda: [r.getMessage() for r in caplog.records if "read again" in r.getMessage()]


@pytest.mark.parametrize("reasoning", [True, pytest.param(False, marks=pytest.mark.full)])
def test_an_agent_s_session_reads_at_most_9_percent_of_its_prompts(server, reasoning):
    usages = [asked(server, messages, tools=tools(96)) for messages in requests(8, reasoning)]
    total = sum(usage["prompt_tokens"] for usage in usages)
    assert len(usages) == 27
    assert total - sum(map(cached, usages)) <= 0.09 * total


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(content) -> dict:
    return {"role": "user", "content": content}


def call(name: str, thought: str | None = None) -> dict:
    function = {"name": name, "arguments": '{"path": "a"}'}
    made = {"role": "assistant", "content": "", "tool_calls": [{"id": name, "type": "function", "function": function}]}
    return made | ({"reasoning_content": thought} if thought else {})


def result(name: str, text: str) -> dict:
    return {"role": "tool", "tool_call_id": name, "content": text}


SYSTEM = system(f"It is 10:31:07.\n{LONG}")
TOOLS = tools(300)
LOOP = [system("Help."), user("Do it."), call("tool_1", "I look."), result("tool_1", LONG)]
CHANGES = {
    "system": ([SYSTEM, user("Hi")], [system(f"It is 11:31:07.\n{LONG}"), user("Hi")], {}, {}),
    "tools": ([system("Help."), user("Hi")], [system("Help."), user("Hi")], {"tools": TOOLS}, {"tools": TOOLS[::-1]}),
    "reasoning": (LOOP, [*LOOP[:2], call("tool_1"), LOOP[3]], {"tools": TOOLS[:2]}, {"tools": TOOLS[:2]}),
    "message 1": ([system("Help."), user(f"One. {LONG}")], [system("Help."), user(f"Two. {LONG}")], {}, {}),
    "message 3": ([*LOOP[:3], result("tool_1", f"A {LONG}")], [*LOOP[:3], result("tool_1", f"B {LONG}")],
                  {"tools": TOOLS[:2]}, {"tools": TOOLS[:2]}),
}  # fmt: skip


@pytest.mark.parametrize("guess", CHANGES)
def test_the_log_tells_the_place_and_what_has_changed_and_no_text(server, lines, guess):
    before, after, first, second = CHANGES[guess]
    asked(server, before, **first)
    assert not lines()
    usage = asked(server, after, **second)
    (line,) = lines()
    assert line.endswith(f"likely cause: {guess}")
    place = int(line.partition("at token ")[2].split()[0])
    processor = server.service.processor
    one, other = (
        processor.encode_messages(messages, **{"tools": fields["tools"]} if fields else {}).tokens
        for messages, fields in ((before, first), (after, second))
    )
    assert place == next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    assert cached(usage) <= place and "number" not in line and "31:07" not in line


def test_another_image_is_another_prompt_and_is_told_of(server, lines):
    def shown(name: str) -> list:
        data = base64.b64encode((PICTURES / name).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        return [system("Look."), user([{"type": "text", "text": "See:"}, image, {"type": "text", "text": LONG}])]

    asked(server, shown("shapes.png"))
    again, other = asked(server, shown("shapes.png")), asked(server, shown("triangle.png"))
    assert cached(again) > 200 and cached(other) < 20
    (line,) = lines()
    assert line.endswith("image")


def test_of_other_prompts_nothing_is_told(server, lines):
    words = LONG.split()
    asked(server, [SYSTEM, user("Hi")])
    asked(server, [SYSTEM, user("Who are you?")])
    asked(server, [system(f"It is now. {' '.join(reversed(words))}"), user("Hi")])
    asked(server, [system("It is 10:31:07."), user("Hi")])
    assert not lines()


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def test_the_texts_are_around_the_place_on_one_line(nano):
    model, processor = nano
    library, prompts = model.make_library(), []
    for time_of_day in ("10:31", "11:31"):
        prompts.append(processor.encode_messages([system(f"A\tday,\n{time_of_day} now.\n{LONG}"), user("Hi")]))
    store(library, prompts[0].tokens, TURN)
    found = parted(library, processor, prompts[1], [system("")])
    assert isinstance(found, Parted) and found.again > MUCH
    for text, shown in zip(found.texts, ("11:31 now", "10:31 now"), strict=True):
        assert shown in text and "\\t" in text and "\n" not in text and len(eval(text)) <= 40


def store(library: PrefixLibrary, tokens, kind: str) -> None:
    cache = library.model.make_cache()
    cache.position = cache.position.after([len(tokens)])
    library.store(Prefix(np.array(tokens, np.int32)), cache.snapshot(), kind)


@pytest.mark.full
def test_a_hundred_long_prompts_take_milliseconds_to_compare(nano, capsys):
    """Printed, not asserted: 100 entries of 100,000 tokens, of one conversation and of others."""
    model, processor = nano
    rng, library = np.random.default_rng(0), model.make_library(100)
    base = rng.integers(100, 400, size=100_000)
    for i in range(100):
        other = np.concatenate([base[: 1000 * i], rng.integers(100, 400, size=100_000 - 1000 * i)])
        store(library, other.tolist(), QUERY)
    prompt = processor.encode_messages([user("Hi")])
    object.__setattr__(prompt, "tokens", tuple(base.tolist()))
    began = time.perf_counter()
    for _ in range(10):
        parted(library, processor, prompt)
    with capsys.disabled():
        print(f"{(time.perf_counter() - began) * 100:.1f} ms a prompt")
