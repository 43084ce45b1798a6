"""How the control channel begins: rank 0 listens, and lets in the connections that show the token."""

import hmac
import platform
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import mlx.core as mx
import numpy as np

from mlx_qwen35.distributed.channel import Order
from mlx_qwen35.distributed.control import FollowerEnd, LeaderEnd
from mlx_qwen35.distributed.frames import FrameError, receive
from mlx_qwen35.distributed.group import Group
from mlx_qwen35.distributed.heartbeat import Heartbeat, Peer, sigterm_as_bytes
from mlx_qwen35.errors import InputError

TOKEN = 32  # bytes
WAIT = 10.0  # seconds for the connections of all ranks
_MOST_NAME = 64  # bytes
_HELLO = struct.Struct(f"!{TOKEN}sHH{_MOST_NAME}s")  # token, rank, which of its connections, name of its machine
_BOTH = range(2)
_ORDERS, _BEATS = _BOTH
Beating = Callable[..., Heartbeat]  # Heartbeat, or with another pace
_MOST_STRANGERS = 64  # connections at a time that have not shown the token


def lead(
    group: Group, host: str, beating: Beating = Heartbeat, wait: float = WAIT, others: Sequence[str] | None = None
) -> LeaderEnd:
    """Rank 0's end, once every other rank has connected. host: the address that they reach this machine by.
    wait: seconds for them. others: how the user calls their machines, where this process has started them; None: as
    they call themselves, and what they write is seen.

    InputError control_failed where it cannot listen there, or a rank does not come.
    """
    token = secrets.token_bytes(TOKEN)
    try:
        listener = socket.create_server((host, 0), backlog=128)
    except OSError as error:
        _exchange(group, bytes(TOKEN), 0)  # which tells the others
        raise InputError(
            "control_failed",
            f"rank 0 must listen at {host}, the address that the others reach it by: {error.strerror or error}",
            "The first address of MLX_HOSTFILE must be one of this machine's",
        ) from error
    with listener:
        _exchange(group, token, listener.getsockname()[1])
        door = _Door(listener, token, group.size)
        door.admit_all(wait)
    hosts = [door.hosts[0], *(others or (door.hosts[rank] for rank in range(1, group.size)))]
    orders = {rank: door.inside[rank, _ORDERS] for rank in range(1, group.size)}
    peers = {rank: Peer(hosts[rank], door.inside[rank, _BEATS]) for rank in range(1, group.size)}
    heartbeat = beating(0, peers, signals=sigterm_as_bytes(), unseen=others is not None)
    leader = LeaderEnd(hosts, orders, heartbeat)
    leader.give(Order("welcome", {"hosts": hosts}))
    return leader


def follow(group: Group, host: str, beating: Beating = Heartbeat) -> FollowerEnd:
    """The end of any other rank. host: rank 0's address.

    InputError control_failed where rank 0 cannot be reached.
    """
    token, port = _exchange(group, bytes(TOKEN), 0)
    node = platform.node().encode()[:_MOST_NAME]
    try:
        if not port:
            raise ConnectionError("it cannot listen there")
        with ExitStack() as opened:
            orders, beats = (
                opened.enter_context(_connect(host, port, _HELLO.pack(token, group.rank, which, node)))
                for which in _BOTH
            )
            hosts = receive(orders).fields["hosts"]
            orders.settimeout(None)
            opened.pop_all()
    except (OSError, EOFError, FrameError) as error:
        raise InputError(
            "control_failed",
            f"rank {group.rank} cannot reach rank 0 at {host}, port {port}: {error}",
            "A firewall of rank 0's machine may refuse Python's connections: allow them",
        ) from error
    peers = {0: Peer(hosts[0], beats)}
    return FollowerEnd(hosts, {0: orders}, beating(group.rank, peers, signals=sigterm_as_bytes()))


def _exchange(group: Group, token: bytes, port: int) -> tuple[bytes, int]:
    """Rank 0's token and port, on every rank."""
    found = np.array(group.all_gather(mx.array([port, *token], mx.int32))[0])
    return found[1:].astype(np.uint8).tobytes(), int(found[0])


def _connect(host: str, port: int, hello: bytes) -> socket.socket:
    connection = socket.create_connection((host, port), WAIT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(hello)
    return connection


class _Door:
    """Lets in both connections of every other rank, and nobody else. inside: them by (rank, which). hosts: by rank."""

    def __init__(self, listener: socket.socket, token: bytes, size: int):
        self._listener, self._token = listener, token
        self._wanted = {(rank, which) for rank in range(1, size) for which in _BOTH}
        self._strangers: dict[socket.socket, bytes] = {}  # and what each has sent so far
        self._selector = selectors.DefaultSelector()
        self.inside: dict[tuple[int, int], socket.socket] = {}
        self.hosts = {0: platform.node()}

    def admit_all(self, wait: float) -> None:
        """InputError control_failed if a rank is not there after `wait` seconds."""
        until = time.monotonic() + wait
        self._listener.setblocking(False)
        with self._selector:
            self._selector.register(self._listener, selectors.EVENT_READ)
            while self._wanted and (left := until - time.monotonic()) > 0:
                for key, _ in self._selector.select(left):
                    if key.fileobj is self._listener:
                        self._open()
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._hear(key.fileobj)
        for stranger in self._strangers:
            stranger.close()
        if self._wanted:
            for connection in self.inside.values():
                connection.close()
            missing = " and ".join(str(rank) for rank in sorted({rank for rank, _ in self._wanted}))
            raise InputError(
                "control_failed",
                f"rank {missing} did not connect to rank 0 at {self._listener.getsockname()[0]} within {wait:g} s",
                "A firewall of rank 0's machine may refuse Python's connections: allow them",
            )

    def _open(self) -> None:
        with suppress(OSError):  # gone again
            stranger, _ = self._listener.accept()
            stranger.setblocking(False)
            if len(self._strangers) == _MOST_STRANGERS:
                self._turn_away(next(iter(self._strangers)))
            self._strangers[stranger] = b""
            self._selector.register(stranger, selectors.EVENT_READ)

    def _hear(self, stranger: socket.socket) -> None:
        """Read no more than a hello, and let in who says the right one."""
        heard = self._strangers[stranger]
        try:
            content = stranger.recv(_HELLO.size - len(heard))
        except OSError:
            content = b""
        self._strangers[stranger] = heard = heard + content
        if not content or not hmac.compare_digest(heard[:TOKEN], self._token[: len(heard)]):
            return self._turn_away(stranger)
        if len(heard) < _HELLO.size:
            return
        _, rank, which, host = _HELLO.unpack(heard)
        if (rank, which) not in self._wanted:
            return self._turn_away(stranger)
        self._forget(stranger)
        stranger.setblocking(True)
        stranger.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wanted.remove((rank, which))
        self.inside[rank, which] = stranger
        self.hosts[rank] = host.rstrip(b"\0").decode(errors="replace")

    def _turn_away(self, stranger: socket.socket) -> None:
        self._forget(stranger)
        stranger.close()

    def _forget(self, stranger: socket.socket) -> None:
        self._selector.unregister(stranger)
        del self._strangers[stranger]
