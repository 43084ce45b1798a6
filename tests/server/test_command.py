"""mlx_qwen35.serve as a user runs it: what it refuses to start with, what it tells, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import CLIENT, Running

from mlx_qwen35.commands.serve import load_service, main, name_of, parser, terms
from mlx_qwen35.errors import InputError
from mlx_qwen35.server import listen
from mlx_qwen35.server.app import make_app
from mlx_qwen35.server.options import ServerOptions

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "What is 34 + 58?"}], "temperature": 0}
# An answer that does not end by itself: the tokens that end one are forbidden.
ENDLESS = QUESTION | {"max_tokens": 4000, "stream": True, "enable_thinking": False, "loop_guard": False}
Told = tuple[int, str, str]  # exit status, stdout, stderr


@pytest.fixture
def run(loggers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Told]:
    """Runs the command with these arguments in this process."""
    monkeypatch.delenv("MLX_QWEN35_API_KEY", raising=False)

    def command(*arguments: object) -> Told:
        monkeypatch.setattr(sys, "argv", ["mlx_qwen35.serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return command


def refused(told: Told, code: str) -> bool:
    """One line on standard error, and status 2."""
    return told[0] == 2 and told[1] == "" and told[2].count("\n") == 1 and told[2].endswith(f"[{code}]\n")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.test"])
def test_other_machines_are_not_let_in_without_a_key(run: Callable, host: str) -> None:
    assert refused(run("--model", "nano", "--host", host, "--port", 0), "option_missing")


def test_a_key_must_be_one(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    base = ("--model", "nano", "--port", 0, "--api-key-file", file)
    assert refused(run(*base), "text_unreadable")
    for text in ("", " \n", "two words", "two\nlines", "schlüssel"):
        file.write_text(text)
        assert refused(run(*base), "option_invalid")
    monkeypatch.setenv("MLX_QWEN35_API_KEY", "two words")
    told = run("--model", "nano", "--port", 0)
    assert refused(told, "option_invalid") and "two words" not in told[2]


def test_a_port_in_use_is_told(run: Callable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert refused(run("--model", "nano", "--port", taken.getsockname()[1]), "address_unusable")


@pytest.mark.parametrize("host", ["127.0.0.1.", "::2"])
def test_an_address_that_is_not_this_machines_is_told(run: Callable, tmp_path: Path, host: str) -> None:
    file = tmp_path / "key"
    file.write_text("opensesame")
    assert refused(run("--api-key-file", file, "--model", "nano", "--host", host), "address_unusable")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "option_missing"),
        (["--model", "nano", "--port", "65536"], "option_invalid"),
        (["--model", "nano", "--rows", "0"], "option_invalid"),
        (["--model", "nano", "--context", "x"], "option_invalid"),
        (["--model", "nano", "--cors"], "option_unknown"),
        (["--model", "nano", "--allowed-host", "http://models.test"], "option_invalid"),
        (["--model", "nano", "--allowed-host", ""], "option_invalid"),
        (["--model", "nano", "--port", "0", "--kv-bits", "3"], "option_invalid"),
        (["--model", "no/such/folder", "--port", "0"], "model_not_found"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(run: Callable, arguments: list[str], code: str) -> None:
    assert refused(run(*arguments), code)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(InputError) as told:
        load_service(parser().parse(["--model", "nano"]), ServerOptions(context=100_000_000), None)
    assert told.value.code == "option_invalid"


def test_without_its_packages_it_says_what_to_install(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("mlx_qwen35.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    told = run("--model", "nano")
    assert refused(told, "package_missing") and "mlx-qwen35[server]" in told[2]


@pytest.mark.full
def test_help_needs_neither_packages_nor_a_model(tmp_path: Path) -> None:
    for name in ("starlette", "uvicorn", "h11"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    command = [sys.executable, "-m", "mlx_qwen35.serve", "--help"]
    told = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert told.returncode == 0 and "--api-key-file" in told.stdout


def test_a_model_is_called_by_its_folder_or_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    names = {".": "mine", str(tmp_path / "mine") + "/": "mine", "Qwen/Qwen3.5-4B": "Qwen/Qwen3.5-4B", "nano": "nano"}
    assert {name: name_of(name) for name in names} == names


def test_it_tells_its_terms(nano_server: Running) -> None:
    found = terms(nano_server.service, is_open=False), terms(nano_server.service, is_open=True)
    assert found[0] != found[1] and all(f"{nano_server.service.context:,} tokens" in told for told in found)


class Lifetime:
    """A server in this process's main thread, and in another what a test asks it."""

    def __init__(self, host: str = "127.0.0.1"):
        self.options = ServerOptions(host=host)
        self.app = make_app(self.options)
        self.sockets = listen.bind(host, 0)
        self.url = f"http://127.0.0.1:{self.sockets[-1].getsockname()[1]}"
        self.may_load, self.ready = threading.Event(), threading.Event()
        self.failed: list[BaseException] = []

    def run(self, test: Callable[["Lifetime"], None]) -> None:
        def asking() -> None:
            try:
                test(self)
            except BaseException as error:
                self.failed.append(error)
            finally:
                self.may_load.set()
                self.ready.wait()
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=asking)
        thread.start()
        listen.serve(self.app, self.sockets, self._load, self.ready.set)
        thread.join()
        if self.failed:
            raise self.failed[0]

    def _load(self):
        self.may_load.wait()
        return load_service(parser().parse(["--model", "nano"]), self.options, None)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals are handled afterwards as they were before."""
    before = {number: signal.getsignal(number) for number in listen.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_while_the_model_is_loaded_it_says_so_and_a_signal_ends_it(handlers: None) -> None:
    def test(server: Lifetime) -> None:
        health = CLIENT.get(server.url + "/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        for path in (CHAT, "/v1/models", "/v1/messages", "/metrics"):
            response = CLIENT.post(server.url + path, json=QUESTION)
            assert response.status_code == 503 and response.headers["Retry-After"]
            assert response.json()["error"]["type"] == "overloaded_error"
        server.may_load.set()
        server.ready.wait()
        assert CLIENT.get(server.url + "/health").json() == {"status": "ok"}
        assert CLIENT.post(server.url + CHAT, json=QUESTION).json()["choices"][0]["message"]["content"] == "92"

    server = Lifetime("localhost")
    server.run(test)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5)


def test_what_fails_to_load_ends_the_server(handlers: None) -> None:
    server = Lifetime()

    def load() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        listen.serve(server.app, server.sockets, load, server.ready.set)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("begun", [b"GET", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_a_connection_that_never_says_what_it_wants_is_closed(
    nano_server: Running, monkeypatch: pytest.MonkeyPatch, begun: bytes, asked: bool
) -> None:
    monkeypatch.setattr(listen, "HEAD_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", int(nano_server.url.rpartition(":")[2])), timeout=30) as sock:
        if asked:  # before
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        sock.sendall(begun)
        assert b"".join(iter(lambda: sock.recv(4096), b"")) in (b"", b'{"status":"ok"}')  # up to the connection's end


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a process of its own, once it answers; and its URL."""
    command = [sys.executable, "-m", "mlx_qwen35.serve", "--model", "nano", "--port", "0", *arguments]
    with subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr
            yield running, re.findall(r"http://[0-9.:]+", running.stderr.readline())[0]
        finally:
            running.kill()


def events(url: str, body: dict, begun: Callable[[], None], **headers: str) -> list[str]:
    """The data of a stream; `begun` is called behind its first event."""
    found: list[str] = []
    with CLIENT.stream("POST", url + CHAT, json=body, headers=headers) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                found.append(line.removeprefix("data: "))
                if len(found) == 5:
                    begun()
    return found


def forbidden(url: str, **headers: str) -> dict[str, int]:
    """logit_bias without the tokens that end an answer."""
    ask = {"prompt": "<|im_end|><|endoftext|>"}
    tokens = CLIENT.post(url + "/tokenize", json=ask, headers=headers).json()["tokens"]
    return {str(token): -100 for token in tokens}


def test_a_process_tells_its_address_and_ends_streams_on_a_signal() -> None:
    key = {"x-api-key": "opensesame"}
    with process(MLX_QWEN35_API_KEY="opensesame") as (running, url):
        body = ENDLESS | {"logit_bias": forbidden(url, **key)}
        assert CLIENT.post(url + CHAT, json=QUESTION).status_code == 401
        found = events(url, body, lambda: running.send_signal(signal.SIGTERM), **key)
        assert found[-1] == "[DONE]" and json.loads(found[-2])["error"]["code"] == "closing"
        told = running.communicate(timeout=60)[1]
    assert running.returncode == 0 and "Traceback" not in told and "opensesame" not in told


def healthy(url: str) -> bool:
    try:
        return CLIENT.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.full
@pytest.mark.parametrize("number", listen.SIGNALS)
def test_every_signal_ends_a_process_well(number: signal.Signals) -> None:
    with process() as (running, _):
        running.send_signal(number)
        assert f"({number.name})" in running.communicate(timeout=60)[1] and running.returncode == 0


@pytest.mark.full
def test_ctrl_c_once_more_leaves_at_once() -> None:
    with process() as (running, url), socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as sock:
        asked = json.dumps(ENDLESS | {"logit_bias": forbidden(url)}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)  # a client that takes nothing holds the end up
        sock.sendall(f"{head}\r\nContent-Length: {len(asked)}\r\n\r\n".encode() + asked)
        assert sock.recv(64).startswith(b"HTTP/1.1 200 ")
        running.send_signal(signal.SIGINT)
        while healthy(url):
            pass
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode == 130


@pytest.mark.full
def test_ctrl_c_while_the_model_is_loaded_leaves_at_once() -> None:
    command = [sys.executable, "-c", LOADING]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr and "loading" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        assert running.communicate(timeout=60) == (None, "") and running.returncode == 130


LOADING = """
import sys, time
from mlx_qwen35.server import app, listen, options
def load():
    print("loading", file=sys.stderr, flush=True)
    time.sleep(600)
listen.serve(app.make_app(options.ServerOptions()), listen.bind("127.0.0.1", 0), load, print)
"""
