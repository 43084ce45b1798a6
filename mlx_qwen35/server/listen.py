"""Sockets, and uvicorn on them: from the first connection, while the model is still being loaded, to a signal's end."""

import asyncio
import contextvars
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_qwen35.errors import InputError
from mlx_qwen35.server.service import Service

LOG = logging.getLogger("mlx_qwen35.server")
HEAD_SECONDS = 20.0  # for the head of a request
END_SECONDS = 10.0  # for clients to take the end of their answers once the server closes
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # as of ::1, a localhost, without IPv6
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on the addresses of a name, all on the same port. InputError where that cannot be."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for place, (family, *_, address) in enumerate(found):
            try:
                sock = socket.create_server((str(address[0]), port), family=family, backlog=128)
            except OSError as error:
                if error.errno in _ABSENT and (sockets or place + 1 < len(found)):
                    continue
                raise
            sockets.append(sock)
            port = sock.getsockname()[1]  # the one that was taken for 0
    except (OSError, UnicodeError) as error:
        for sock in sockets:
            sock.close()
        why = getattr(error, "strerror", None) or error
        rule = f"the server must be able to listen on {host}, port {port}: {why}. Give another --port"
        raise InputError("address_unusable", rule) from error
    return sockets


def config_of(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_graceful_shutdown=int(END_SECONDS),
    )  # fmt: skip


class Connection(H11Protocol):
    """uvicorn's, which waits no longer than HEAD_SECONDS for the head of a request."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait()
        else:
            self._came()

    def connection_lost(self, exc: Exception | None) -> None:
        self._came()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _came(self) -> None:
        if self._late:
            self._late.cancel()
        self._late = None


class _Server(uvicorn.Server):
    """uvicorn's, which leaves the signals to `serve`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    app: Starlette, sockets: Sequence[socket.socket], load: Callable[[], Service], ready: Callable[[], None]
) -> None:
    """Serve until a signal. Until `load` is done, every request is told that the model is being loaded.

    The first signal ends what runs, each answer with its last event; Ctrl-C once more leaves at once.
    """
    given = contextvars.copy_context()  # how options are spelled on the command line; requests must not
    contextvars.Context().run(asyncio.run, _serve(app, list(sockets), lambda: given.run(load), ready))


async def _serve(
    app: Starlette, sockets: list[socket.socket], load: Callable[[], Service], ready: Callable[[], None]
) -> None:
    server, ended = _Server(config_of(app)), asyncio.Event()

    def end(number: int) -> None:
        if app.state.service is None or (ended.is_set() and number == signal.SIGINT):
            os._exit(128 + number)  # as shells have it; nothing is there to save, or nobody waits for that
        LOG.info("the server ends (%s)", signal.Signals(number).name)
        app.state.closing = True
        ended.set()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(number, end, number)
    serving = asyncio.create_task(server.serve(sockets))
    try:
        service = app.state.service = await asyncio.to_thread(load)
        ready()
        try:
            await asyncio.wait([serving, asyncio.ensure_future(ended.wait())], return_when=asyncio.FIRST_COMPLETED)
        finally:
            app.state.closing = True
            await asyncio.to_thread(service.close)
    finally:
        server.should_exit = True
        await serving
