"""POST /v1/chat/completions over a real socket: what is beside the text of an answer."""

import asyncio
import base64
import io
import json
import logging
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai_stream import events
from PIL import Image
from serving import CLIENT, Running, serving

from mlx_qwen35 import generate
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.load import load
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.history import read_detail
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.stream import openai_stream, sse, with_silence

CHAT = "/v1/chat/completions"
PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
QUESTION = [{"role": "user", "content": "What is 34 + 58?"}]
SHORT = {"reasoning_effort": "none", "temperature": 0}
ENDLESS = {"logit_bias": {"991": -100, "993": -100}, "max_tokens": 20_000}  # of a model that cannot say an end token


def content(server: Running, messages: list[dict[str, Any]], **fields: Any) -> str:
    answer = server.post(CHAT, {"messages": messages} | SHORT | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_a_stream_that_waits_says_so_at_once(nano_server: Running) -> None:
    go = threading.Event()
    nano_server.service.do(lambda: go.wait(60) and None)
    body = {"messages": QUESTION, "stream": True} | SHORT
    with CLIENT.stream("POST", nano_server.url + CHAT, json=body) as answer:
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": waiting"
        go.set()
        assert any('"content": "9' in line for line in lines)


@pytest.mark.full
def test_a_stream_tells_how_far_the_prompt_is_read(nano_server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 800}], "stream": True, "max_tokens": 2} | SHORT
    text = nano_server.post(CHAT, body | {"stream_options": {"include_usage": True}}).text
    (total,) = re.findall(r'"prompt_tokens": (\d+)', text)
    told = re.findall(r"^: reading (\d+) of (\d+)$", text, re.MULTILINE)
    read = [int(tokens) for tokens, _ in told]
    assert {of for _, of in told} == {total}
    assert read == sorted(read) and 0 < read[-1] <= int(total)


def test_a_stream_talks_as_long_as_nothing_comes() -> None:
    async def told() -> list[str | None]:
        enough, items = asyncio.Event(), []

        async def late() -> AsyncGenerator[str]:
            await enough.wait()
            yield "text"

        async for item in with_silence(late(), 0.001):
            items.append(item)
            if len(items) == 4:
                enough.set()
        return items

    *silence, text = asyncio.run(told())
    assert len(silence) >= 4 and set(silence) == {None} and text == "text"


def test_usage_is_told_in_a_stream_that_asks_for_it(nano_server: Running) -> None:
    body = {"messages": QUESTION, "stream": True} | SHORT
    assert not any("usage" in chunk for chunk in events(nano_server.post(CHAT, body).text))
    *before, last = events(nano_server.post(CHAT, body | {"stream_options": {"include_usage": True}}).text)
    assert all(chunk["usage"] is None for chunk in before) and last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] > 0  # the request before was the same


def test_an_answer_goes_on_with_the_last_message(nano_server: Running) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "9"}]
    assert content(nano_server, begun, continue_final_message=True, add_generation_prompt=False) == "2"


def test_any_model_is_served_unless_the_server_is_strict(nano_server: Running) -> None:
    answer = nano_server.post(CHAT, {"messages": QUESTION, "model": "gpt-4o", "max_tokens": 1}).json()
    assert answer["model"] == "nano"
    with serving(strict_model=True) as strict:
        for path, body in ((CHAT, {"messages": QUESTION}), ("/v1/completions", {"prompt": "a"}), ("/tokenize", {})):
            refused = strict.post(path, body | {"model": "gpt-4o"})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_an_unknown_field_is_logged_once(nano_server: Running, caplog: pytest.LogCaptureFixture) -> None:
    odd = {"role": "user", "content": "What is 34 + 58?", "test_chat_mood": "bad"}
    with caplog.at_level(logging.WARNING, "mlx_qwen35.server"):
        for _ in range(2):
            content(nano_server, [odd], test_chat_dryness=7, store=True, user="me", metadata={})
    told = [record.getMessage() for record in caplog.records if "unknown field" in record.getMessage()]
    assert [place for place in ("messages.0.test_chat_mood", "test_chat_dryness") if str(told).count(place) == 1] == [
        "messages.0.test_chat_mood", "test_chat_dryness",
    ]  # fmt: skip
    assert len(told) == 2


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"), [(ApiError(503, "interrupted", "it ends"), "interrupted"), (KeyError("x"), "internal_error")]
)
def test_an_error_in_a_stream_is_its_last_event(error: Exception, code: str) -> None:
    async def chunks() -> AsyncGenerator[str]:
        yield 'data: {"choices": []}\n\n'
        raise error

    async def told() -> str:
        return "".join([chunk async for chunk in openai_stream(chunks())])

    first, last = events(asyncio.run(told()))
    assert first == {"choices": []}
    assert last.keys() == {"error"} and last["error"]["code"] == code and "x" not in last["error"]["message"].split()


def test_an_answer_that_the_server_ends_is_no_answer() -> None:
    body = {"messages": QUESTION, "stream": True} | ENDLESS
    with serving() as running, httpx.stream("POST", running.url + CHAT, json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        assert any("reasoning" in line for line in lines)
        running.service.close()
        told = [line for line in lines if line.startswith("data: ")]
    *before, error, done = told
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "closing"
    assert done == "data: [DONE]" and all('"finish_reason": null' in line for line in before)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(stream: bool) -> None:
    body = json.dumps({"messages": QUESTION, "stream": stream} | ENDLESS).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with serving() as running:
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: running.service.running == 1)
        wait_until(lambda: running.service.running == 0)


def wait_until(reached: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- images and videos ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "fields", "options"),
    [("image", "number.png", {}, {}), ("video", "moving.mp4", {"fps": 1}, {"fps": 1}),
     ("video", "moving.mp4", {"num_frames": 2}, {"video_num_frames": 2})],
)  # fmt: skip
def test_images_and_videos_are_seen(
    nano_server: Running, kind: str, name: str, fields: dict[str, Any], options: Any
) -> None:
    file = PICTURES / name
    url = f"data:;base64,{base64.b64encode(file.read_bytes()).decode()}"
    text = {"type": "text", "text": "What do you see?"}
    right = generate(
        nano_server.service.model, nano_server.service.processor, text["text"], temp=0, enable_thinking=False,
        max_tokens=5, **({"images": [file]} if kind == "image" else {"videos": [file]}), **options,
    )  # fmt: skip
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    answer = nano_server.post(
        CHAT, {"messages": [{"role": "user", "content": [part | fields, text]}], "max_tokens": 5} | SHORT
    ).json()
    told = answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]
    assert told == (right.text, right.prompt_tokens)


def test_an_event_is_one_line_for_every_client() -> None:
    assert len(sse({"content": "a\u2028b\u2029c\x85d\x1ce"}).splitlines()) == 2


def test_an_image_of_low_detail_has_fewer_pixels(tmp_path: Path) -> None:
    folder = shutil.copytree(resolve("nano"), tmp_path / "nano")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"]["longest_edge"] = 1 << 20
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    service = SimpleNamespace(processor=load(str(folder))[1], options=ServerOptions())
    file = io.BytesIO()
    Image.new("RGB", (1024, 1024)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    def side(detail: str, **most: int) -> int:
        return read_detail(service, "image", url, "url", detail, **most).pixels.shape[1]

    assert (side("high"), side("low"), side("low", max_pixels=64 * 64)) == (1024, 512, 64)


def test_low_detail_makes_no_image_larger_than_the_others(nano_server: Running) -> None:
    url = f"data:;base64,{base64.b64encode((PICTURES / 'number.png').read_bytes()).decode()}"
    read = [read_detail(nano_server.service, "image", url, "url", detail) for detail in ("low", "auto")]
    assert read[0].pixels.shape == read[1].pixels.shape
