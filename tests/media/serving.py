"""A web server on this machine, in a thread of the test. tests/media/conftest.py has it as the fixture `server`."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = bytes(range(256)) * 5


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.close_connection = True
        self.server.asked.append(self)
        self.server.routes.get(self.path, self.server.answer)(self)

    def log_message(self, *args):
        pass


Answer = Callable[[Handler], object]


class Server(ThreadingHTTPServer):
    """Answers each path with what `routes` says, and others with `answer`; `asked` holds what came.

    `address` leads to it, `url` to an image. `over` is set when the test is over.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes: dict[str, Answer] = {}
        self.answer: Answer = send
        self.asked: list[Handler] = []
        self.over = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.address}/a.png"

    def handle_error(self, *_):  # a client that leaves
        pass

    def sends(self, path: str, body: bytes = BODY, kind: str | None = "image/png", status: int = 200, **headers) -> str:
        """A plain answer at `path`; a header of value None is left out. Returns the URL."""
        headers = {"Content-Type": kind} | headers
        return self.does(path, lambda handler: send(handler, body, status, **headers))

    def does(self, path: str, answer: Answer) -> str:
        self.routes[path] = answer
        return self.address + path


def send(handler: Handler, body: bytes = BODY, status: int = 200, **headers: str | None) -> None:
    """A whole answer; a header of value None is left out."""
    start(handler, {"Content-Length": str(len(body)), **headers}, status)
    handler.wfile.write(body)


def start(handler: Handler, headers: dict[str, str | None], status: int = 200) -> None:
    """The beginning of an answer, up to its body."""
    handler.send_response(status)
    for name, value in headers.items():
        if value is not None:
            handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.flush()
