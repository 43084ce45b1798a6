"""Who may ask, and what a request may hold. What one client sends hurts no other."""

import json
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
from serving import CLIENT, Running, serving

from mlx_qwen35.server import body as limits

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "What is 34 + 58?"}], "temperature": 0}


def answered(response: httpx.Response) -> bool:
    return response.json()["choices"][0]["message"]["content"] == "92"


def code(response: httpx.Response) -> str:
    """The error's code, of a well-formed error in OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error["code"]


def let_in(response: httpx.Response) -> bool:
    """Whether a request came up to its endpoint, which misses the messages."""
    return response.status_code == 400 and response.json()["error"]["param"] == "messages"


# --- who may ask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:99", "127.0.0.1:1", "127.8.8.8", "[::1]:80", "[::1]"])
def test_a_name_of_this_machine_is_let_in(nano_server: Running, host: str) -> None:
    assert let_in(nano_server.post(CHAT, {}, headers={"Host": host}))
    assert let_in(nano_server.post(CHAT, {}, headers={"Origin": f"http://{host}"}))


FOREIGN = ["evil.test", "evil.test:8080", "localhost.evil.test", "127.0.0.1.evil.test", "10.0.0.1", "[::2]", "::1@evil",
           "localhost@evil.test", "", "a b", "[", "localhost:x", "xn--localhost"]  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("path", [CHAT, "/health", "/"])
def test_another_host_is_refused(nano_server: Running, host: str, path: str) -> None:
    response = CLIENT.get(nano_server.url + path, headers={"Host": host})
    assert response.status_code == 403 and code(response) == "host_refused"


@pytest.mark.parametrize("origin", ["null", *(f"http://{host}" for host in FOREIGN), "localhost", "http:localhost"])
def test_another_origin_is_refused(nano_server: Running, origin: str) -> None:
    response = nano_server.post(CHAT, QUESTION, headers={"Origin": origin})
    assert response.status_code == 403 and code(response) == "origin_refused"


def test_no_answer_lets_another_origin_read_it(nano_server: Running) -> None:
    asks = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    for response in (
        nano_server.post(CHAT, {}, headers=asks),
        CLIENT.options(nano_server.url + CHAT, headers=asks),
        CLIENT.get(nano_server.url + "/health", headers=asks),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with the key "opensesame", which is reached as models.test too."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text("opensesame\n")
    with serving(api_key_file=file, allowed_host=["models.test"]) as running:
        yield running


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "opensesame"}, {"Authorization": "Bearer opensesam"}, {"Authorization": "Bearer"},
     {"Authorization": "Basic opensesame"}, {"x-api-key": "opensesamé".encode()}, {"x-api-key": ""}],
)  # fmt: skip
def test_without_the_key_nothing_is_answered(keyed: Running, headers: dict) -> None:
    for path in (CHAT, "/v1/models", "/metrics", "/no/such/path", "/health/"):
        response = keyed.post(path, QUESTION, headers=headers)
        assert response.status_code == 401 and code(response) == "key_invalid"
    response = keyed.post("/v1/messages", QUESTION, headers=headers)
    assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"


def test_a_wrong_key_is_told_from_none(keyed: Running) -> None:
    asked = [{}, {"x-api-key": ""}, {"x-api-key": "sesame"}, {"Authorization": "Bearer sesame"}]
    none, empty, wrong, other = (keyed.post(CHAT, {}, headers=headers).json()["error"]["message"] for headers in asked)
    assert none == empty != wrong == other and "sesame" not in wrong


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer opensesame"}, {"authorization": "bearer  opensesame"}, {"x-api-key": "opensesame"},
     {"Authorization": "Bearer other", "x-api-key": "opensesame"}],
)  # fmt: skip
def test_with_the_key_a_question_is_answered(keyed: Running, headers: dict) -> None:
    assert let_in(keyed.post(CHAT, {}, headers=headers))


def test_a_host_that_was_allowed_is_let_in(keyed: Running) -> None:
    key = {"x-api-key": "opensesame"}
    assert let_in(keyed.post(CHAT, {}, headers={"Host": "Models.test:8080"} | key))
    assert let_in(keyed.post(CHAT, {}, headers={"Origin": "https://models.test"} | key))
    refused = keyed.post(CHAT, QUESTION, headers={"Host": "Other.test:8080"} | key)
    assert code(refused) == "host_refused" and "--allowed-host other.test " in refused.json()["error"]["message"]


# --- what a body may be ----------------------------------------------------------------------------------------------


def send(server: Running, content: bytes | Iterator[bytes], kind: str = "application/json", **headers: str):
    return CLIENT.post(server.url + CHAT, content=content, headers={"Content-Type": kind} | headers)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_that_is_not_said_to_be_json_is_refused(nano_server: Running, kind: str) -> None:
    response = send(nano_server, json.dumps(QUESTION).encode(), kind)
    assert response.status_code == 415 and code(response) == "media_type_wrong"


def test_a_packed_body_is_refused(nano_server: Running) -> None:
    assert send(nano_server, b"{}", **{"Content-Encoding": "gzip"}).status_code == 415


def test_the_media_type_may_have_parameters(nano_server: Running) -> None:
    assert let_in(send(nano_server, b"{}", "Application/JSON; charset=utf-8"))


BROKEN = {
    "nothing": b"",
    "no end": b'{"messages": [',
    "two values": b"{} {}",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a mark": b"\xef\xbb\xbf{}",
    "a name twice": b'{"a": {"b": 1, "b": 2}}',
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": -Infinity}',
    "beyond a float": b'{"temperature": 1e999}',
    "an integer of 5,000 digits": b'{"n": ' + b"9" * 5000 + b"}",
    "65 levels": b"[" * 65 + b"]" * 65,
    "65 levels of objects": b'{"a":' * 65 + b"1" + b"}" * 65,
    "100,000 levels": b"[" * 100_000,
    "a comma more": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "millions of values": b"[" + b"[]," * 2_000_000 + b"[]]",
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_json_is_refused(nano_server: Running, what: str) -> None:
    response = send(nano_server, BROKEN[what])
    assert response.status_code == 400 and code(response) == "json_invalid"


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_read(nano_server: Running) -> None:
    assert let_in(send(nano_server, rb'{"user": "\ud83d\ude42"}'))
    response = send(nano_server, rb'{"user": "\ud83d"}')
    assert response.status_code == 400 and code(response) == "text_invalid"


def test_64_levels_are_read(nano_server: Running) -> None:
    assert code(send(nano_server, b"[" * 64 + b"]" * 64)) != "json_invalid"


def test_33_megabytes_are_refused_before_they_come(nano_server: Running) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(nano_server.url).port), timeout=30) as sock:
        sock.sendall(head("Content-Length: 33000000", "Expect: 100-continue"))
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_33_megabytes_without_a_length_are_refused_once_they_came(nano_server: Running) -> None:
    response = send(nano_server, iter([b'{"user": "', *[b"a" * 1_000_000] * 33, b'"}']))
    assert response.status_code == 413 and code(response) == "body_too_large"


def test_errors_of_messages_have_anthropics_shape(nano_server: Running) -> None:
    answers = [
        CLIENT.post(nano_server.url + "/v1/messages", content=b"{", headers={"Content-Type": "application/json"}),
        CLIENT.post(nano_server.url + "/v1/messages/count_tokens", content=b"{}"),
        CLIENT.get(nano_server.url + "/v1/messages/no/such/path"),
        CLIENT.get(nano_server.url + "/v1/messages", headers={"Host": "evil.test"}),
    ]
    for response in answers:
        assert response.json()["type"] == "error" and set(response.json()["error"]) == {"type", "message", "details"}
    assert [response.status_code for response in answers] == [400, 415, 404, 403]


def test_unknown_paths_and_methods_are_refused_in_the_apis_shape(nano_server: Running) -> None:
    gone = CLIENT.get(nano_server.url + "/v1/no/such/path")
    assert gone.status_code == 404 and code(gone) == "not_found"
    assert CLIENT.get(nano_server.url + CHAT + "/").status_code == 404  # and no redirect
    wrong = CLIENT.get(nano_server.url + CHAT)
    assert wrong.status_code == 405 and code(wrong) == "method_not_allowed" and wrong.headers["Allow"] == "POST"


# --- slow clients ----------------------------------------------------------------------------------------------------


def head(*lines: str) -> bytes:
    names = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines]
    return "\r\n".join([*names, "", ""]).encode()


def test_a_client_that_is_slow_with_its_body_is_refused(nano_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", httpx.URL(nano_server.url).port), timeout=30) as sock:
        sock.sendall(head("Content-Length: 100") + b"{")
        told = b"".join(iter(lambda: sock.recv(4096), b""))  # up to the connection's end
    assert told.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in told


def test_slow_clients_hold_up_nobody(nano_server: Running) -> None:
    port = httpx.URL(nano_server.url).port
    slow = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(100)]
    for number, sock in enumerate(slow):
        sock.sendall((head("Content-Length: 100") + b"{") if number % 2 else head()[:-30])
    assert answered(nano_server.post(CHAT, QUESTION))
    for sock in slow:
        sock.close()


def test_one_client_that_fails_takes_no_other_along(nano_server: Running) -> None:
    results = []
    threads = [threading.Thread(target=lambda: results.append(nano_server.post(CHAT, QUESTION))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for broken in BROKEN.values():
        send(nano_server, broken)
    send(nano_server, b"{}")
    for thread in threads:
        thread.join()
    assert [answered(response) for response in results] == [True] * 4


# --- counts ----------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "look"}}
TOO_MUCH = {
    "n": 9,
    "top_logprobs": 21,
    "stop": ["a"] * 17,
    "logit_bias": {str(token): 1 for token in range(1025)},
    "tools": [TOOL | {"function": {"name": f"look{number}"}} for number in range(257)],
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "a" * 65_536}}},
    "max_tokens": 0,
    "temperature": 3,
}


@pytest.mark.parametrize("field", TOO_MUCH)
def test_too_much_of_a_field_is_refused_by_its_name(nano_server: Running, field: str) -> None:
    response = nano_server.post(CHAT, QUESTION | {"logprobs": True, field: TOO_MUCH[field]})
    assert response.status_code == 400 and code(response)
    assert response.json()["error"]["param"].startswith(field)
