"""Memory is given back and taken again: after minutes without a request, and where the machine runs short of it."""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from serving import CLIENT, Running, serving

from mlx_qwen35.errors import InputError
from mlx_qwen35.load import load
from mlx_qwen35.machine.awake import Awake
from mlx_qwen35.machine.pressure import CRITICAL, NORMAL, WARNING
from mlx_qwen35.options import on_command_line
from mlx_qwen35.server.idle import Upkeep
from mlx_qwen35.server.options import ServerOptions

QUESTION = {"messages": [{"role": "user", "content": "What is 34 + 58?"}], "temperature": 0, "max_tokens": 60}


@dataclass
class Machine:
    """What the server sees: a clock that the test moves, memory pressure, and programs that it starts."""

    now: float = 0.0
    level: int | None = None
    awake: list[bool] = field(default_factory=list)
    loads: int = 0

    def given(self, model: Callable[[], Any]) -> dict[str, Any]:
        def again() -> Any:
            self.loads += 1
            return model()

        started = Awake(lambda command: self.awake.append(True) or self)
        return {"clock": lambda: self.now, "level": lambda: self.level, "awake": started, "load": again}

    def terminate(self) -> None:
        self.awake.append(False)

    def wait(self) -> int:
        return 0


@contextmanager
def served(load_again: Callable[[], Any] = lambda: load("nano"), **options: Any) -> Iterator[tuple[Running, Machine]]:
    machine = Machine()
    with serving(machine=machine.given(load_again), **options) as running:
        yield running, machine


def pass_(running: Running, machine: Machine, seconds: float) -> None:
    """Let time pass, and the engine thread look at the machine."""
    machine.now += seconds
    for _ in range(2):
        done = threading.Event()
        running.service.do(done.set)
        assert done.wait(30)


def ask(running: Running, **fields: Any) -> str:
    answer = running.post("/v1/chat/completions", QUESTION | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_after_minutes_without_a_request_the_memory_is_given_back_and_the_next_one_loads(tmp_path):
    gc.collect()
    before = mx.get_active_memory()
    go, asked = threading.Event(), QUESTION | {"stream": True, "max_tokens": 8}
    with served(lambda: go.wait(30) and load("nano"), idle_unload=5, session_dir=tmp_path) as (running, machine):
        expected = ask(running, max_tokens=8)
        held = mx.get_active_memory() - before
        pass_(running, machine, 4 * 60)
        assert running.service.model and machine.loads == 0
        pass_(running, machine, 61)
        assert running.service.model is None and running.service.library is None
        assert mx.get_active_memory() - before < 0.01 * held
        with CLIENT.stream("POST", running.url + "/v1/chat/completions", json=asked) as answer:
            lines = answer.iter_lines()
            assert next(lines) and running.service.model is None  # the client hears of it while the model is loaded
            go.set()
            said = [json.loads(line[6:])["choices"] for line in lines if line.startswith("data: {")]
        assert "".join(choices[0]["delta"].get("content") or "" for choices in said if choices) == expected
        assert machine.loads == 1
        usage = running.post("/v1/chat/completions", QUESTION | {"max_tokens": 1}).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0
        assert running.service.library.counts.reused > usage["prompt_tokens_details"]["cached_tokens"]  # of the folder


@pytest.mark.full
def test_other_weights_on_the_disk_are_refused_and_the_right_ones_are_taken_again(text_model):
    others = [lambda: (text_model(), None), lambda: load("nano")]
    with served(lambda: others.pop(0)(), idle_unload=1) as (running, machine):
        expected = ask(running)
        pass_(running, machine, 61)
        answer = running.post("/v1/chat/completions", QUESTION)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_changed"
        assert running.service.model is None
        assert ask(running) == expected and machine.loads == 2


def test_a_model_that_cannot_be_loaded_again_is_told_of(tmp_path):
    with served(lambda: load(tmp_path / "gone"), idle_unload=1) as (running, machine):
        pass_(running, machine, 61)
        answer = running.post("/v1/chat/completions", QUESTION)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_unavailable"


@pytest.mark.full
def test_what_runs_is_never_unloaded():
    with served(idle_unload=1) as (running, machine):
        with CLIENT.stream("POST", running.url + "/v1/chat/completions", json=QUESTION | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            pass_(running, machine, 600)
            assert running.service.model and any("[DONE]" in line for line in lines)
        pass_(running, machine, 30)
        assert running.service.model and machine.loads == 0


def test_what_is_being_prepared_keeps_the_model_and_nothing_that_is_to_be_written(monkeypatch):
    go, closed = threading.Event(), threading.Event()

    async def use(running, machine):
        service = running.service
        monkeypatch.setattr(service.upkeep, "close", closed.set)
        preparing = asyncio.ensure_future(service.off_loop(lambda: go.wait(30)))
        await asyncio.sleep(0)  # it has begun
        await asyncio.to_thread(pass_, running, machine, 61)
        kept = service.model
        closing = asyncio.ensure_future(asyncio.to_thread(service.close))
        written = await asyncio.to_thread(closed.wait, 10)
        go.set()
        await asyncio.gather(preparing, closing)
        assert kept and written

    with served(idle_unload=1) as given:
        asyncio.run(use(*given))


def test_a_failed_look_at_the_machine_ends_nothing():
    machine, levels = Machine(), [NORMAL]
    with serving(machine=machine.given(lambda: load("nano")) | {"level": levels.pop}) as running:
        pass_(running, machine, 2)
        ask(running, max_tokens=1)


@pytest.fixture(scope="module")
def plain() -> Iterator[tuple[Running, Machine]]:
    with served() as found:
        yield found


def test_short_of_memory_snapshots_go_first_and_then_new_work_is_refused(plain):
    running, machine = plain
    machine.level = NORMAL
    ask(running, max_tokens=1)
    pass_(running, machine, 2)
    assert running.service.library.entries()
    machine.level = WARNING
    pass_(running, machine, 2)
    assert not running.service.library.entries()
    machine.level = CRITICAL
    pass_(running, machine, 2)
    refused = running.post("/v1/chat/completions", QUESTION)
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
    assert refused.json()["error"]["code"] == "memory_pressure"
    machine.level = NORMAL
    pass_(running, machine, 2)
    ask(running, max_tokens=1)


def test_the_machine_stays_awake_while_there_is_work(plain):
    running, machine = plain
    pass_(running, machine, 2)
    machine.awake.clear()
    with CLIENT.stream("POST", running.url + "/v1/chat/completions", json=QUESTION | {"stream": True}) as answer:
        next(answer.iter_lines())
        pass_(running, machine, 2)
    pass_(running, machine, 0.5)
    assert machine.awake == [True]
    wait(lambda: not running.service.running)
    pass_(running, machine, 2)
    assert machine.awake == [True, False]


def test_a_folder_that_another_server_has_is_told_by_its_option(nano_server: Running, tmp_path: Path) -> None:
    service, options = nano_server.service, ServerOptions(session_dir=tmp_path)
    first = Upkeep(service.model, service.processor, options)
    with pytest.raises(InputError) as told, on_command_line():
        Upkeep(service.model, service.processor, options)
    first.close()
    assert told.value.code == "session_busy" and f"--session-dir {tmp_path} " in str(told.value)


def wait(until: Callable[[], bool]) -> None:
    for _ in range(3000):
        if until():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")
