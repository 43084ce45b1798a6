"""Whatever is sent, to any endpoint: a well-formed answer of its API, no failure, and others get their text."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server.test_control_tokens import BODIES, filled, texts
from server.test_media import png, uri
from serving import CLIENT, Running

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "What is 34 + 58?"}], "temperature": 0}
_SEEN = {"type": "image_url", "image_url": {"url": uri(png())}}

# A good body of each endpoint, from which the others are made.
GOOD: dict[str, dict[str, Any]] = {
    **{path: filled(body, texts(0, "")) for path, body in BODIES.items()},
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 2, "logprobs": 2, "stop": "x", "echo": False},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}], "system": "b"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1, 2]},
}
GOOD[CHAT] |= {"n": 2, "seed": 1, "temperature": 0.5, "logit_bias": {"1": 2}, "logprobs": True, "top_logprobs": 2,
               "response_format": {"type": "text"}, "tool_choice": "auto",
               "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
GOOD[CHAT]["messages"][2]["content"].append(_SEEN)
MOST = {CHAT: "max_completion_tokens", "/v1/completions": "max_tokens", "/v1/messages": "max_tokens",
        "/v1/responses": "max_output_tokens"}  # fmt: skip

ODD = ["", "a", "0", "data:image/png;base64,AAAA", "file:///etc/hostname", "/etc/hostname", "http://127.0.0.1:1/a.png",
       "<|im_end|>", "\ud800", "\0", "{", "[]", "assistant", "auto", "required", "json_schema", "image_url", "text",
       "function", uri(png(1, 1)), "a" * 70_000]  # fmt: skip
NUMBERS = st.integers() | st.sampled_from([-1, 0, 1, 9, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -0.0])
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False) | st.text(max_size=20) | st.sampled_from(ODD)
NAMES = st.sampled_from(
    ["type", "role", "content", "text", "url", "name", "n", "stop", "stream", "tools", "tool_choice", "thinking",
     "response_format", "json_schema", "regex", "choice", "seed", "input", "system", "max_tokens", "$ref", "enum"]
) | st.text(max_size=8)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all values in a body, but for the body itself."""
    if way:
        yield way
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*way, name))


@st.composite
def bodies(draw: st.DrawFn, path: str) -> dict[str, Any]:
    """A good body with one to three changes. Answers stay short."""
    body = json.loads(json.dumps(GOOD[path]))
    for _ in range(draw(st.integers(1, 3))):
        *way, name = draw(st.sampled_from(sorted(places(body), key=str) or [("model",)]))
        within = body
        for step in way:
            within = within[step]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "remove" and body:
            del within[name]
        elif change == "add" and isinstance(within, dict):
            within[draw(NAMES)] = draw(VALUES)
        else:
            within[name] = draw(VALUES)
    if path in MOST:
        if not isinstance(body.get(MOST[path]), str | list | bool | float):
            body[MOST[path]] = draw(st.sampled_from([1, 2, 0, -1]))
        body |= draw(st.sampled_from([{}, {"stream": True}]))
    return body


def well_formed(path: str, response: httpx.Response) -> bool:
    """Whether an answer is one of the API that the path belongs to."""
    if response.headers["content-type"].startswith("text/event-stream"):
        return ended_once(path, [line for line in response.text.splitlines() if line.startswith("data: ")])
    told = response.json()
    if response.status_code == 200:
        return isinstance(told, dict) and not told.get("error")
    error = told["error"]
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    if path.startswith("/v1/messages"):
        return told["type"] == "error"
    return set(told) == {"error"} and set(error) == {"message", "type", "param", "code"} and bool(error["code"])


def ended_once(path: str, lines: list[str]) -> bool:
    """Whether a stream has one last event, at its end."""
    data = [line.removeprefix("data: ") for line in lines]
    if path in (CHAT, "/v1/completions"):
        return data.count("[DONE]") == 1 and data[-1] == "[DONE]"
    last = ("message_stop", "error") if path == "/v1/messages" else ("response.completed", "response.incomplete",
                                                                     "response.failed", "error")  # fmt: skip
    kinds = [json.loads(item)["type"] for item in data]
    return [kind in last for kind in kinds] == [False] * (len(kinds) - 1) + [True]


@contextmanager
def beside(server: Running) -> Iterator[None]:
    """While the block runs, somebody asks a question again and again, and always gets the same answer."""
    over, answers = threading.Event(), list[str]()

    def ask() -> None:
        while not over.wait(0.1 if answers else 0):
            choice = server.post(CHAT, QUESTION).json()["choices"][0]
            answers.append(choice["message"]["reasoning_content"] + choice["message"]["content"])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert set(answers) == {answers[0]} and answers[0].endswith("92")


def examples(count: int) -> Callable:
    """How often hypothesis tries: the same examples each time."""
    return settings(max_examples=count, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


def check_bodies(server: Running, count: int) -> None:
    @examples(count)
    @given(st.data())
    def test(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(GOOD)))
        body = data.draw(bodies(path))
        written = json.dumps(body).encode()  # escapes, NaN and all
        response = CLIENT.post(server.url + path, content=written, headers={"Content-Type": "application/json"})
        assert response.status_code < 500 and well_formed(path, response), response.text

    with beside(server):
        test()


def check_requests(server: Running, count: int) -> None:
    kinds = st.sampled_from(["application/json", "application/json; charset=utf-8", "text/plain", ""])
    paths = st.sampled_from([*GOOD, "/v1/models", "/v1/models/a", "/metrics", "/health", "/", "/page/../x", "/v1/a//b"])
    methods = st.sampled_from(["GET", "POST", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "ODD"])
    whole = VALUES.map(lambda value: json.dumps(value).encode())
    contents = whole | whole.map(lambda text: text[: len(text) // 2]) | st.binary(max_size=40) | st.just(b"[" * 70)

    @examples(count)
    @given(methods, paths, kinds, contents)
    def test(method: str, path: str, kind: str, content: bytes) -> None:
        response = CLIENT.request(method, server.url + path, content=content, headers={"Content-Type": kind})
        assert response.status_code < 500
        if response.status_code != 200:
            assert well_formed(path, response), response.text

    test()


def check_bytes(server: Running, count: int) -> None:
    address = ("127.0.0.1", httpx.URL(server.url).port)
    heads = st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"])
    lines = st.sampled_from(
        [b"Content-Length: -1\r\n", b"Content-Length: 1\r\nContent-Length: 2\r\n", b"Host: a\r\nHost: b\r\n",
         b"Transfer-Encoding: chunked\r\n\r\nx", b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"LONG",
         b"\r\n\r\n"]
    ) | st.binary(max_size=60)  # fmt: skip

    @examples(count)
    @given(heads, st.lists(lines, max_size=3))
    def test(head: bytes, rest: list[bytes]) -> None:
        told = b""
        with socket.create_connection(address, timeout=30) as sock:
            with suppress(OSError):  # the server may end it first
                sock.sendall(head + b"".join(rest).replace(b"LONG", b"A" * 100_000))
                sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                told = sock.recv(65536)
        assert not told.startswith(b"HTTP/1.1 5")

    test()
    assert CLIENT.get(server.url + "/health").status_code == 200


CHECKS = {"bodies": check_bodies, "requests": check_requests, "bytes": check_bytes}


@pytest.mark.parametrize("what", CHECKS)
def test_whatever_comes_is_answered(nano_server: Running, what: str) -> None:
    CHECKS[what](nano_server, 10)


@pytest.mark.full
@pytest.mark.parametrize("what", CHECKS)
def test_much_more_is_answered(nano_server: Running, what: str) -> None:
    CHECKS[what](nano_server, 1500)


@pytest.mark.full
@pytest.mark.parametrize("path", GOOD)
def test_the_bodies_that_others_are_made_from_are_good(nano_server: Running, path: str) -> None:
    short = {MOST[path]: 1} if path in MOST else {}
    for stream in ({}, {"stream": True}) if path in MOST else ({},):
        response = nano_server.post(path, GOOD[path] | short | stream)
        assert response.status_code == 200 and well_formed(path, response), response.text
