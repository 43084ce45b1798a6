"""Servers in processes of their own, on this machine alone, asked over HTTP by several clients at once.

Prompts are random digits, each of which is one token, so none shares a beginning with another. Answers are greedy, and
may not end before their length. The session is an agent's: every turn sends all of the conversation before it.
"""

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.bench.measure import OURS, Beside, ProgramError, in_turn, last_words

MODULES = {OURS: "mlx_qwen35.serve", "mlx-lm": "mlx_lm.server"}
ENDS = ("<|endoftext|>", "<|im_end|>", "<think>", "<tool_call>")  # tokens that would end an answer, or its text
START_SECONDS = 600


@dataclass(frozen=True)
class Settings:
    """clients: how many ask at once. requests: of each client in a round. turns: of the session."""

    prompt_tokens: int
    answer_tokens: int
    clients: tuple[int, ...]
    repeats: int
    dtype: str
    requests: int = 2
    turns: int = 8


@dataclass(frozen=True)
class Reply:
    """One answer. Times are in seconds from the request."""

    first: float  # until its first text
    seconds: float
    text: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int


@dataclass(frozen=True)
class Run:
    """What one server did in one round: with so many clients, or the session where clients is 0."""

    program: str
    clients: int
    round: int
    seconds: float
    replies: tuple[Reply, ...]

    @property
    def requests_per_second(self) -> float:
        return len(self.replies) / self.seconds

    @property
    def tokens(self) -> int:
        """Generated."""
        return sum(reply.tokens for reply in self.replies)

    @property
    def tokens_read(self) -> int:
        """Of the prompts, without what was kept from earlier ones."""
        return sum(reply.prompt_tokens - reply.cached_tokens for reply in self.replies)


class Server:
    """A server's process, until `close`. It listens on 127.0.0.1."""

    def __init__(self, name: str, folder: Path, dtype: str, beside: Beside | None = None):
        """Raises ProgramError when it is not installed or does not come up. beside: the adapter that is asked."""
        self.name, self._ends = name, _end_tokens(folder)
        self._model = "default_model"  # of mlx-lm; ours answers by the model alone
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", MODULES[name], "--model", str(folder), "--port", str(self.port)]
        command += ["--dtype", dtype] if name == OURS else ["--log-level", "ERROR"]
        if beside and name == OURS:
            command += ["--adapter", f"{beside.name}={beside.path}", "--adapter-scale", str(beside.scale)]
            self._model = f"{folder.resolve().name}:{beside.name}"
        elif beside:
            command += ["--adapter-path", str(beside.path)]
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]  # for a checkout not installed
        environment = {"MLX_ENABLE_TF32": "0", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the server)
        self._process = subprocess.Popen(command, stdout=self._errors, stderr=self._errors, env=environment)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _wait(self) -> None:
        for _ in range(START_SECONDS * 10):
            if self._ready():
                return
            if (code := self._process.poll()) is not None:
                raise ProgramError(self.name, last_words(self._errors, code))
            time.sleep(0.1)
        raise ProgramError(self.name, f"it was not ready within {START_SECONDS} seconds")

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def ask(self, messages: Sequence[dict[str, str]], tokens: int) -> Reply:
        """Have a conversation answered with so many tokens. Raises ProgramError."""
        body = {
            "model": self._model, "messages": messages, "stream": True, "stream_options": {"include_usage": True},
            "temperature": 0, "max_tokens": tokens, "logit_bias": dict.fromkeys(self._ends, -100),
            "chat_template_kwargs": {"enable_thinking": False},
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
        start = time.perf_counter()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                if response.status != 200:
                    raise ProgramError(self.name, f"HTTP {response.status}: {response.read()[:300].decode()}")
                return self._read(response, start)
        except (OSError, http.client.HTTPException) as error:
            raise ProgramError(self.name, f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse, start: float) -> Reply:
        text, first = "", 0.0
        usage: dict[str, Any] = {}
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ProgramError(self.name, f"an error in its stream: {chunk['error']}")
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            first = first or (time.perf_counter() - start if text else 0.0)
            usage = chunk.get("usage") or usage
        if not usage:
            raise ProgramError(self.name, "its stream had no usage")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        seconds = time.perf_counter() - start
        return Reply(first or seconds, seconds, text, usage["prompt_tokens"], cached, usage["completion_tokens"])

    def close(self) -> None:
        """End the process. Closing twice is fine."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


def _end_tokens(folder: Path) -> list[str]:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return [str(token["id"]) for token in added if token["content"] in ENDS]


@contextmanager
def serving(
    names: Sequence[str], folder: Path, dtype: str, failures: dict[str, str], beside: Beside | None = None
) -> Iterator[list[Server]]:
    """A server for each program that comes up. The others go to `failures` with the reason."""
    with ExitStack() as stack:
        servers = []
        for name in names:
            try:
                servers.append(Server(name, folder, dtype, beside))
            except ProgramError as error:
                failures[error.program] = str(error)
            else:
                stack.callback(servers[-1].close)
        yield servers


def measure(
    servers: Sequence[Server], settings: Settings, failures: dict[str, str], progress: Callable[[str], None]
) -> list[Run]:
    """A warm-up of every server, then `repeats` rounds in which each is asked in turn; clients of 0 is the session.

    A server that fails goes to `failures` without its runs. The others go on, unless ours has failed.
    """
    by_name = {server.name: server for server in servers}
    runs: list[Run] = []
    for clients in (*settings.clients, 0):
        for round in range(-1, settings.repeats):
            for name in in_turn([name for name in by_name if name not in failures], round):
                what = f"{clients} clients" if clients else "session"
                progress(f"{what}, {'warm-up' if round < 0 else f'round {round + 1}'}: {name}")
                try:
                    run = _run(by_name[name], clients, round, settings)
                except ProgramError as error:
                    failures[error.program] = str(error)
                    if OURS in failures:
                        return []
                else:
                    runs += [run] if round >= 0 else []
    return [run for run in runs if run.program not in failures]


def _digits(count: int, *seed: Any) -> dict[str, str]:
    """A user's message of so many tokens, the same for every server."""
    return {"role": "user", "content": "".join(random.Random(repr(seed)).choices("0123456789", k=count))}


def _run(server: Server, clients: int, round: int, settings: Settings) -> Run:
    start = time.perf_counter()
    replies = tuple((_ask_at_once if clients else _talk)(server, clients, round, settings))
    return Run(server.name, clients, round, time.perf_counter() - start, replies)


def _ask_at_once(server: Server, clients: int, round: int, settings: Settings) -> list[Reply]:
    def client(number: int) -> list[Reply]:
        return [
            server.ask([_digits(settings.prompt_tokens, clients, round, number, i)], settings.answer_tokens)
            for i in range(settings.requests if round >= 0 else 1)
        ]

    with ThreadPoolExecutor(clients) as pool:
        return [reply for replies in pool.map(client, range(clients)) for reply in replies]


def _talk(server: Server, _: int, round: int, settings: Settings) -> Iterator[Reply]:
    messages: list[dict[str, str]] = []
    for turn in range(settings.turns if round >= 0 else min(2, settings.turns)):
        messages.append(_digits(settings.prompt_tokens, "session", round, turn))
        reply = server.ask(messages, settings.answer_tokens)
        messages.append({"role": "assistant", "content": reply.text})
        yield reply
