"""What the log and the figures tell, and what they never do."""

import asyncio
import io
import json
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from server.test_media import png, uri
from serving import CLIENT, Running, computing, serving
from starlette.responses import Response

from mlx_qwen35.server.fields import Fields
from mlx_qwen35.server.log import LOG, to_stderr
from mlx_qwen35.server.status import Metrics, metrics

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "What is 34 + 58?"}], "temperature": 0}


@pytest.fixture
def lines(loggers: None, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the server writes to standard error."""
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    to_stderr(with_text=False)
    return written


def test_a_request_is_a_line_of_counts(nano_server: Running, lines: io.StringIO) -> None:
    usage = nano_server.post(CHAT, QUESTION).json()["usage"]
    for path in ("/health", "/metrics", "/page/page.css", "/no/such%20path%0A%1B[31m"):
        CLIENT.get(nano_server.url + path)
    told, gone = of(lines, 2)
    counts = rf"{usage['prompt_tokens']} in \(\d+ cached\), {usage['completion_tokens']} out, stop, \d+\.\d\d s"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d POST {CHAT} 200 {counts}", told)
    assert re.fullmatch(r"\d\d:\d\d:\d\d GET /no/such%20path\\n\\x1b\[31m 404 not_found, \d+\.\d\d s", gone)


def test_a_refused_request_is_told_by_code_and_field(nano_server: Running, lines: io.StringIO) -> None:
    nano_server.post(CHAT, QUESTION | {"temperature": 9})
    nano_server.post("/v1/messages", {"messages": [{"role": "user"}], "max_tokens": 1})
    nano_server.post(CHAT, QUESTION | {"chat_template_kwargs": {f"{SECRET} it is": 1}})
    bad, missing, made_up = of(lines, 3)
    assert " 400 invalid_value temperature, " in bad and " 400 missing_field messages.0.content, " in missing
    assert " 400 unsupported_field ?, " in made_up and SECRET not in made_up


def test_what_ended_an_answer_at_a_length_is_told(nano_server: Running, lines: io.StringIO) -> None:
    nano_server.post(CHAT, QUESTION | {"max_tokens": 1})
    assert " 1 out, length (max_tokens), " in of(lines, 1)[0]


def test_what_had_come_before_a_client_left_is_counted(nano_server: Running, lines: io.StringIO) -> None:
    ends = nano_server.post("/tokenize", {"prompt": "<|im_end|><|endoftext|>"}).json()["tokens"]
    endless = {"stream": True, "max_tokens": 20_000, "loop_guard": False, "logit_bias": {str(e): -100 for e in ends}}
    before = figures(nano_server)["mlx_qwen35_generated_tokens_total"]
    with CLIENT.stream("POST", nano_server.url + CHAT, json=QUESTION | endless) as answer:
        assert [line for line, _ in zip(answer.iter_lines(), range(40), strict=False)]
    left = re.search(r" in \(\d+ cached\), (\d+) out, left, ", of(lines, 2)[1])
    assert left and int(left[1]) > 1
    assert figures(nano_server)["mlx_qwen35_generated_tokens_total"] == before + int(left[1])


def of(lines: io.StringIO, count: int) -> list[str]:
    """So many lines, which follow the answers to their requests."""
    until = time.monotonic() + 20
    while lines.getvalue().count("\n") < count and time.monotonic() < until:
        time.sleep(0.01)
    found = lines.getvalue().splitlines()
    assert len(found) == count
    return found


SECRET = "opensesame"


def test_lines_go_on_where_standard_error_was_closed(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    later = io.StringIO()
    monkeypatch.setattr("sys.stderr", later)
    lines.close()
    LOG.info("a line")
    assert of(later, 1)[0].endswith(" a line")


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_a_warning_is_a_line_without_text(
    nano_server: Running, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", lines)
    to_stderr(with_text=False)  # pytest has undone what the fixture did to warnings
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": f"{SECRET}("}}
    result = {"role": "tool", "tool_call_id": "1", "content": "none"}
    messages = [*QUESTION["messages"], {"role": "assistant", "tool_calls": [call]}, result]
    assert nano_server.post(CHAT, {"messages": messages, "max_tokens": 1}).status_code == 200
    told, _ = of(lines, 2)
    assert re.match(r"\d\d:\d\d:\d\d the arguments ", told) and SECRET not in told


def test_of_an_unknown_field_a_short_name_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    Fields({"x" * 50: 1, f"{SECRET} ": 1, "a.b-c_1": 1}, "test_log").done()
    assert [record.args for record in caplog.records] == [(f"test_log.{name}",) for name in ("x" * 40, "?", "a.b-c_1")]


def test_text_keys_and_media_stay_out_of_the_log(nano_server: Running, lines: io.StringIO) -> None:
    content = [
        {"type": "text", "text": SECRET},
        {"type": "image_url", "image_url": {"url": uri(png())}},
    ]
    key = {"Authorization": f"Bearer {SECRET}", "x-api-key": SECRET}
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "user": SECRET}
    assert nano_server.post(f"{CHAT}?key={SECRET}", asked, headers=key).status_code == 200
    nano_server.post(CHAT, {"messages": SECRET}, headers=key)
    nano_server.post(CHAT, {"messages": [{"role": SECRET, "content": SECRET}]}, headers=key)
    content[1] = {"type": "image_url", "image_url": {"url": f"http://{SECRET}.test/a.png?{SECRET}"}}
    nano_server.post(CHAT, asked, headers=key)
    of(lines, 4)
    assert SECRET not in lines.getvalue() and "base64" not in lines.getvalue()


def test_a_failure_of_the_server_is_told_by_its_place_and_answered(
    nano_server: Running, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(nano_server.service, "prepare", broken)
    for path in (CHAT, "/v1/messages"):
        response = nano_server.post(path, QUESTION | {"max_tokens": 4})
        assert response.status_code == 500 and SECRET not in response.text
        assert response.json()["error"]["type"] == "api_error"
    assert "RuntimeError" in lines.getvalue() and "in broken" in lines.getvalue()
    assert SECRET not in lines.getvalue()


def test_text_is_told_where_it_is_asked_for(lines: io.StringIO) -> None:
    with serving(log_text=True) as server:
        source = {"type": "base64", "media_type": "image/png", "data": uri(png()).partition(",")[2]}
        server.post("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}],
                                     "max_tokens": 1})  # fmt: skip
        text = "https://example.com/ is what?"
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": uri(png())}]
        server.post(CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 4})
    told = lines.getvalue()  # the server has ended
    asked = json.loads(told.split("asked: ")[2].splitlines()[0])
    assert asked["messages"][0]["content"][0]["text"] == text
    assert "answered: " in told and "base64," not in told and source["data"][:40] not in told


def figures(server: Running) -> dict[str, float]:
    response = CLIENT.get(server.url + "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    heads = [tuple(line.split()[1:3]) for line in response.text.splitlines() if line.startswith("#")]
    assert heads[::2] == [("HELP", name) for _, name in heads[1::2]] and len(set(heads)) == len(heads)
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z0-9_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [-+0-9.e]+', line) for line in lines)
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_figures_add_up(nano_server: Running) -> None:
    told = {"role": "system", "content": "Be brief. " * 40}  # read once
    asked = QUESTION | {"messages": [told, *QUESTION["messages"]]}
    nano_server.post(CHAT, asked)
    before = figures(nano_server)
    usage = nano_server.post(CHAT, asked).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    for _ in range(2):
        CLIENT.get(nano_server.url + "/never/seen")
    after = figures(nano_server)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more(f'mlx_qwen35_requests_total{{path="{CHAT}",status="200"}}') == 1
    assert more('mlx_qwen35_requests_total{path="other",status="404"}') == 2
    assert more("mlx_qwen35_prompt_tokens_total") == usage["prompt_tokens"]
    assert more("mlx_qwen35_cached_tokens_total") == usage["prompt_tokens_details"]["cached_tokens"]
    assert more("mlx_qwen35_generated_tokens_total") == usage["completion_tokens"]
    assert more("mlx_qwen35_first_token_seconds_count") == more('mlx_qwen35_first_token_seconds_bucket{le="+Inf"}') == 1
    assert after["mlx_qwen35_memory_bytes"] > after["mlx_qwen35_weights_bytes"] > 0
    assert after["mlx_qwen35_running"] == after["mlx_qwen35_waiting"] == 0
    assert after["mlx_qwen35_library_bytes"] > 0
    assert not any("never" in name for name in after)


def test_figures_that_wait_for_a_step_hold_up_nobody_else(nano_server: Running) -> None:
    state = SimpleNamespace(metrics=Metrics(), service=nano_server.service)
    request: Any = SimpleNamespace(app=SimpleNamespace(state=state))

    async def asked() -> Response:
        with computing():
            told = asyncio.create_task(metrics(request))
            await asyncio.sleep(0)  # it begins
        return await told

    assert b"library_bytes" in asyncio.run(asked()).body


def test_a_server_that_answers_is_healthy(nano_server: Running) -> None:
    response = CLIENT.get(nano_server.url + "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
