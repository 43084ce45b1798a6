"""A server of these tests: uvicorn on a free port, in a thread of this process."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from mlx_qwen35.load import load
from mlx_qwen35.machine.process import LOCK
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.server.app import make_app
from mlx_qwen35.server.listen import bind, config_of
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.service import Service

Loads = Callable[[], tuple[Model, Processor]]
CLIENT = httpx.Client(timeout=60)  # one for all: making one reads the certificates of the system


@dataclass
class Running:
    """A server that runs. url: http://127.0.0.1:PORT."""

    url: str
    service: Service

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return CLIENT.post(self.url + path, json=body, **options)


@contextmanager
def computing() -> Iterator[None]:
    """A model computes in another thread. AssertionError where the block waits for it."""
    begun, go, ended = threading.Event(), threading.Event(), []

    def step() -> None:
        with LOCK:
            begun.set()
            ended.append(go.wait(10))

    thread = threading.Thread(target=step)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        go.set()
        thread.join()
    assert ended == [True]


@contextmanager
def serving(model: str | Loads = "nano", machine: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Running]:
    """Serve a model with these options of the server. model: its name, or what loads it. machine: a clock, and what
    `Upkeep` sees.
    """

    def loads() -> tuple[Model, Processor]:
        return load(model) if isinstance(model, str) else model()

    given = {"load": loads} | dict(machine or {})
    service = Service(*loads(), ServerOptions(port=0, **options), "nano", **given)
    service.start()
    server = uvicorn.Server(config_of(make_app(service.options, service)))
    sockets = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(url, service)
    finally:
        server.should_exit = True
        thread.join()
        service.close()
