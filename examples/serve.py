"""Start mlx_qwen35.serve on nano in a process of its own, ask it over HTTP, and stop it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import NamedTuple
from urllib.request import Request, urlopen

from mlx_qwen35.console.interrupt import unwound_when_ended

SECONDS = 120  # for each step, on a slow machine too


class Served(NamedTuple):
    url: str  # http://127.0.0.1:PORT
    process: subprocess.Popen


@contextmanager
def served(*options: str) -> Iterator[Served]:
    """A server with these options, on a free port of this machine alone. It is ended however the block ends."""
    command = [sys.executable, "-m", "mlx_qwen35.serve", "--port", "0", *options]
    with unwound_when_ended(), TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            yield Served(_address(process, said.fileno()), process)
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen, said: int) -> str:
    for _ in range(SECONDS * 20):
        text = os.pread(said, 100_000, 0).decode()
        if found := re.search(r"http://127\.0\.0\.1:\d+", text):
            return found[0]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    sys.exit(f"the server did not start: {text}")


def stop(server: Served) -> int | None:
    """End it as a service manager does, with SIGTERM. Gives its exit status, None where it did not end in time."""
    server.process.terminate()
    try:
        return server.process.wait(30)
    except subprocess.TimeoutExpired:
        return None


def ask(url: str, **body: object) -> dict:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=SECONDS) as response:
        return json.load(response)


if __name__ == "__main__":
    with served("--model", "nano") as server:
        messages = [{"role": "user", "content": "What is 34 + 58?"}]
        answer = ask(f"{server.url}/v1/chat/completions", messages=messages, temperature=0)
        print("the server answers:", answer["choices"][0]["message"]["content"])
        if (status := stop(server)) != 0:
            sys.exit(f"the server ended with status {status}")
