"""Prompts that share what they begin with, over the API: what is read, and where one parts from another."""

import ast
import base64
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from engine.agent_session import requests, tools
from serving import Running, computing

from mlx_qwen35.cache.prefix import TURN, PrefixLibrary
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.engine.encode import prefix_of
from mlx_qwen35.load import load
from mlx_qwen35.server.idle import Upkeep
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.report import MUCH, Parted, parted

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
LONG = " ".join(f"word{i} is number {i * 7 % 31}." for i in range(30))  # more than MUCH tokens


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


@pytest.mark.full  # tests/engine/test_reuse.py has it without a server
@pytest.mark.parametrize("reasoning", [True, False])
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


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def store(library: PrefixLibrary, prefix: Prefix, kind: str = TURN) -> None:
    """Store a prompt that nobody has read."""
    cache = library.model.make_cache()
    cache.position = cache.position.after([len(prefix)])
    library.store(prefix, cache.snapshot(), kind)


def compared(nano, before: list, after: list, first: dict, second: dict) -> tuple[Parted | None, int]:
    """What is told of a prompt behind another one, and where the two part."""
    model, processor = nano
    library = model.make_library()
    one, other = (processor.encode_messages(*own[:1], **own[1]) for own in ((before, first), (after, second)))
    store(library, prefix_of(one))
    pairs = zip(one.tokens, other.tokens, strict=False)
    place = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), 0)
    return parted(library, processor, other, after, second.get("tools")), place


def test_a_new_question_drops_the_reasoning_before_it(nano):
    found, _ = compared(nano, LOOP, [*LOOP, user("And?")], {}, {})
    assert found and found.guess == "reasoning"


@pytest.mark.parametrize("guess", CHANGES)
def test_the_place_and_what_has_changed(nano, guess):
    found, place = compared(nano, *CHANGES[guess])
    assert found and (found.token, found.guess) == (place, guess)
    assert MUCH <= found.again < 2000 and str(place) in str(found) and guess in str(found)
    assert not any(text in str(found) for text in found.texts)


def test_of_another_image_the_place_is_its_own(nano):
    def shown(name: str) -> list:
        image = {"type": "image", "image": PICTURES / name}
        return [system("Look."), user([{"type": "text", "text": "See:"}, image, {"type": "text", "text": LONG}])]

    found, _ = compared(nano, shown("shapes.png"), shown("triangle.png"), {}, {})
    assert found and found.guess == "image"
    start = nano[1].encode_messages(shown("triangle.png")).placeholders[0].start
    assert found.token == start


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([SYSTEM, user("Hi")], [SYSTEM, user("Who are you?")]),
        ([SYSTEM, user("Hi")], [system(" ".join(reversed(LONG.split()))), user("Hi")]),
        ([SYSTEM, user("Hi")], [system("It is 10:31:07."), user("Hi")]),
        ([SYSTEM, user("Hi")], [SYSTEM, user("Hi")]),
        ([*LOOP[:2], call("tool_1"), LOOP[3]], LOOP[:2]),
        (LOOP, [*LOOP, call("tool_2"), result("tool_2", LONG)]),
    ],
)
def test_of_prompts_that_go_on_or_are_others_nothing_is_told(nano, before, after):
    model, processor = nano
    library = model.make_library()
    one = processor.encode_messages(before)
    for mark in one.marks:
        store(library, prefix_of(one).upto(mark.length), mark.kind)
    assert parted(library, processor, processor.encode_messages(after), after) is None


def test_the_texts_are_around_the_place_on_one_line(nano):
    before, after = ([system(f"A\tday,\n{at} now.\n{LONG}"), user("Hi")] for at in ("10:31", "11:31"))
    found, _ = compared(nano, before, after, {}, {})
    assert found and found.again > MUCH
    for text, shown in zip(found.texts, ("11:31 now", "10:31 now"), strict=True):
        assert shown in text and "\\t" in text and "\n" not in text and len(ast.literal_eval(text)) <= 40


@pytest.mark.parametrize("log_text", [False, True])
def test_the_log_has_a_line_and_texts_only_where_asked(nano, caplog, log_text):
    caplog.set_level(logging.INFO, "mlx_qwen35.server")
    model, processor = nano
    library, upkeep = model.make_library(), Upkeep(model, processor, ServerOptions(log_text=log_text))
    before, after, *_ = CHANGES["system"]
    store(library, prefix_of(processor.encode_messages(before)))
    found = upkeep.prepared(library, processor.encode_messages(after), after, None)
    (line,) = caplog.messages
    assert found and str(found) in line and ("11:31:07" in line) == ("10:31:07" in line) == log_text


def test_a_request_is_made_ready_while_the_model_computes(nano):
    model, processor = nano
    library, upkeep = model.make_library(), Upkeep(model, processor, ServerOptions())
    before, after, *_ = CHANGES["system"]
    store(library, prefix_of(processor.encode_messages(before)))
    with computing():
        assert upkeep.prepared(library, processor.encode_messages(after), after, None)


def test_a_look_at_what_is_stored_that_fails_ends_no_request(nano, caplog):
    model, processor = nano
    library, upkeep = model.make_library(), Upkeep(model, processor, ServerOptions())
    before, after, *_ = CHANGES["system"]
    store(library, prefix_of(processor.encode_messages(before)))
    upkeep.processor = None
    assert upkeep.prepared(library, processor.encode_messages(after), after, None) is None
    assert [record.exc_info[0] for record in caplog.records] == [AttributeError]


def test_a_folder_may_be_in_the_user_s_own(nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Upkeep(*nano, ServerOptions(session_dir=Path("~/prefixes"))).close()
    assert (tmp_path / "home" / "prefixes").is_dir() and len(list(tmp_path.iterdir())) == 1


def test_a_client_is_told_the_place_and_the_cause_and_no_text(server):
    before, after, *_ = CHANGES["system"]
    assert "parted" not in asked(server, before)["prompt_tokens_details"]
    told = asked(server, after)["prompt_tokens_details"]["parted"]
    assert told.keys() == {"token", "again", "guess"} and told["guess"] == "system" and told["again"] > MUCH


def test_another_image_is_read_anew(server):
    def shown(name: str) -> list:
        data = base64.b64encode((PICTURES / name).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        return [system("Look."), user([{"type": "text", "text": "See:"}, image, {"type": "text", "text": "What?"}])]

    first, again, other = (asked(server, shown(name)) for name in ("shapes.png", "shapes.png", "triangle.png"))
    assert cached(first) == 0 and cached(again) > first["prompt_tokens"] - 10 and cached(other) < 20


@pytest.mark.full
def test_a_hundred_long_prompts_take_milliseconds_to_compare(nano, capsys):
    """Printed, not asserted: 100 entries of 100,000 tokens, of one conversation and of others."""
    model, processor = nano
    rng, library = np.random.default_rng(0), model.make_library(100)
    base = rng.integers(100, 400, size=100_000)
    for i in range(100):
        other = np.concatenate([base[: 1000 * i], rng.integers(100, 400, size=100_000 - 1000 * i)])
        store(library, Prefix(other.astype(np.int32)))
    prompt = processor.encode_messages([user("Hi")])
    object.__setattr__(prompt, "tokens", tuple(base.tolist()))
    began = time.perf_counter()
    for _ in range(10):
        parted(library, processor, prompt)
    with capsys.disabled():
        print(f"{(time.perf_counter() - began) * 100:.1f} ms a prompt")
