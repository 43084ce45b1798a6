"""A server's end and its next beginning, as processes: what was read stays read."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving import CLIENT

ANSWER = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is 34 + 58?"}]
SECONDS = 90


@contextmanager
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of nano with this folder, and its URL. It is killed in the end, if it still runs."""
    command = [sys.executable, "-m", "mlx_qwen35.serve", "--model", "nano", "--port", "0", "--session-dir", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            line = next(line for line in server.stderr if "is served on" in line)
            yield server, line.partition("is served on ")[2].partition("/v1")[0]
        finally:
            server.kill()


def asked(url: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 8} | fields
    answer: dict[str, Any] = CLIENT.post(url + ANSWER, json=body).json()
    return answer


def cached(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def written(folder: Path) -> int:
    return len(list(folder.glob("*.states.safetensors")))


def test_what_was_read_outlives_a_kill_and_a_term(tmp_path):
    with process(tmp_path) as (server, url):
        first, second = asked(url), asked(url)
        assert cached(first) == 0
        while not written(tmp_path):
            time.sleep(0.01)
        server.kill()
        server.wait()
    with process(tmp_path) as (server, url):
        again = asked(url)
        assert cached(again) == cached(second) > 0
        assert again["choices"] == second["choices"]
        kept = written(tmp_path)
        other = [{"role": "user", "content": "Count to a thousand, and write each number as a word."}]
        body = {"messages": other, "stream": True, "max_tokens": 4000}
        with CLIENT.stream("POST", url + ANSWER, json=body) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: "))
            assert any('"content"' in next(lines) for _ in range(3))
            server.send_signal(signal.SIGTERM)
            last, *_, done = list(lines)[-2:]
        assert done == "data: [DONE]"
        ended = json.loads(last[6:])
        assert "error" in ended or any(choice["finish_reason"] for choice in ended["choices"])
        assert server.wait(SECONDS) in (0, 128 + signal.SIGTERM)
    assert written(tmp_path) > kept and not list(tmp_path.glob("*.saving"))
