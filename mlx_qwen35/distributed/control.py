"""The control channel: rank 0's orders to the other ranks and their answers, over TCP beside the collectives.

Rank 0 listens on the one address that the others reach it by, at a port of the system's choice. Port and a random token
reach them by a collective. A connection that does not begin with the token is closed. Of every rank there are two
connections: one for orders and answers, one for the heartbeat. What goes over them is not encrypted, as in MLX's ring.
"""

import signal
import socket
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from mlx_qwen35.distributed.channel import Order
from mlx_qwen35.distributed.frames import FrameError, receive, send
from mlx_qwen35.distributed.heartbeat import Heartbeat
from mlx_qwen35.distributed.ring import is_collective
from mlx_qwen35.errors import InputError

_ANSWER = "answer"


class _End:
    """What both ends have: hosts (names of all ranks' machines) and a heartbeat. Left by `with`."""

    def __init__(self, hosts: Sequence[str], orders: Mapping[int, socket.socket], heartbeat: Heartbeat):
        self.hosts = tuple(hosts)
        self._orders, self.heartbeat = dict(orders), heartbeat

    def __enter__(self) -> Self:
        return self

    @contextmanager
    def _speaking_to(self, rank: int) -> Iterator[None]:
        """What breaks in the block ends the process: the peer at the other end is lost."""
        try:
            yield
        except (OSError, EOFError) as error:
            self.heartbeat.lost(f"the channel to rank {rank} ({self.hosts[rank]}) broke: {error}")
            raise
        except FrameError as error:
            self.heartbeat.lost(f"rank {rank} ({self.hosts[rank]}) sent what is no order: {error}")
            raise

    def fail(self, error: BaseException) -> None:
        """An error that the other ranks cannot go on after: it is told, and ends every rank and this process. Of a
        broken collective the cause is told, if there is one.
        """
        if is_collective(error):
            self.heartbeat.lost(f"a collective broke: {error}")
        self.heartbeat.fail(_described(error))

    def _close(self) -> None:
        for connection in self._orders.values():
            connection.close()


class LeaderEnd(_End):
    """Rank 0's end, a Leader. Left without an error, or by Ctrl-C, it lets the others end with 0; left by an error,
    with 1, and in both cases in silence.
    """

    def __init__(self, hosts: Sequence[str], orders: Mapping[int, socket.socket], heartbeat: Heartbeat):
        super().__init__(hosts, orders, heartbeat)
        self._lock, self._unread = threading.Lock(), 0

    def give(self, order: Order) -> None:
        """Send an order to every other rank. It waits only while the system holds no more for a rank that is behind.

        ValueError for what no order can hold: fields that JSON has not, arrays of other dtypes, more than 1 GiB.
        """
        with self._lock:
            for rank, connection in self._orders.items():
                with self._speaking_to(rank):
                    send(connection, order)

    def answers(self) -> Sequence[Mapping[str, Any]]:
        """The next answer of every other rank, in the order of ranks. Waits for them."""
        for _ in range(self._unread):
            self._next_answers()
        self._unread = 0
        return self._next_answers()

    def leave_answers(self) -> None:
        """Nobody will ask for the next answers: they are skipped."""
        self._unread += 1

    def _next_answers(self) -> list[Mapping[str, Any]]:
        found = []
        for rank, connection in self._orders.items():
            with self._speaking_to(rank):
                found.append(receive(connection).fields)
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if is_collective(error):
            self.heartbeat.lost(f"a collective broke: {error}")
        elif error is None or isinstance(error, KeyboardInterrupt) or _is_quiet_exit(error):
            self.heartbeat.goodbye()
        else:
            self.heartbeat.give_up()
        self._close()


class FollowerEnd(_End):
    """The end of any other rank, a Follower. Left by an error it has rank 0 tell of it, and ends the process with 1."""

    def take(self) -> Order | None:
        """The next order; waits for it. None once rank 0 has ended well."""
        with self._speaking_to(0):
            try:
                return receive(self._orders[0])
            except (OSError, EOFError):
                if self.heartbeat.ended_well():
                    return None
                raise

    def answer(self, fields: Mapping[str, Any]) -> None:
        """Answer rank 0, values that JSON can hold."""
        with self._speaking_to(0):
            send(self._orders[0], Order(_ANSWER, fields))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self.fail(error)
        self._close()


def _is_quiet_exit(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0, 128 + signal.SIGINT)


def _described(error: BaseException) -> str:
    """An error in one line: what the user can mend with its code, any other with its place."""
    if isinstance(error, InputError):
        return f"{error} [{error.code}]"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename.rpartition('/')[2]}:{place.lineno})"
