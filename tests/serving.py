"""A server of these tests: uvicorn on a free port, in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from mlx_qwen35.load import load
from mlx_qwen35.server.app import make_app
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.service import Service

CLIENT = httpx.Client(timeout=60)  # one for all: making one reads the certificates of the system


@dataclass
class Running:
    """A server that runs. url: http://127.0.0.1:PORT."""

    url: str
    service: Service

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return CLIENT.post(self.url + path, json=body, **options)


@contextmanager
def serving(model: str = "nano", **options: Any) -> Iterator[Running]:
    """Serve a model with these options of the server."""
    service = Service(*load(model), ServerOptions(port=0, **options), "nano")
    service.start()
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    (port,) = {socket.getsockname()[1] for own in server.servers for socket in own.sockets}
    try:
        yield Running(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = True
        thread.join()
        service.close()
