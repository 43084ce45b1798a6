"""Rank 0 and the others connect over TCP, each rank a thread here."""

import platform
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from queue import Queue

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35.distributed.channel import Order
from mlx_qwen35.distributed.connecting import TOKEN, follow, lead
from mlx_qwen35.distributed.control import LeaderEnd
from mlx_qwen35.distributed.heartbeat import Heartbeat, Pace

HERE = "127.0.0.1"


class Ring:
    """all_gather of one array of each rank. seen: called by rank 0 with its array before the others have it."""

    def __init__(self, size: int, seen: Callable[[np.ndarray], None] = lambda _: None):
        self.size, self.seen = size, seen
        self.barrier = threading.Barrier(size, timeout=20)
        self.places: list[np.ndarray] = [np.zeros(0)] * size


class Alone(Ring):
    """The others are there for all_gather, and do not come."""

    def __init__(self, size: int, seen: Callable[[np.ndarray], None]):
        super().__init__(size, seen)
        self.barrier = threading.Barrier(1)
        self.places = [np.zeros(1 + TOKEN)] * size


@dataclass
class Group:
    ring: Ring
    rank: int
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.ring.size

    def all_gather(self, array: mx.array) -> mx.array:
        self.ring.places[self.rank] = np.array(array)
        if self.rank == 0:
            self.ring.seen(self.ring.places[0])
        self.ring.barrier.wait()
        return mx.array(np.stack(self.ring.places))


class Rank(Group):
    """A rank whose faults end no process. ended: statuses. said: lines."""

    def __init__(self, ring: Ring, rank: int):
        super().__init__(ring, rank)
        self.ended: list[int] = []
        self.said: list[str] = []

    def beating(self, *given, **options) -> Heartbeat:
        return Heartbeat(*given, pace=Pace(leave=0.1), end=self.ended.append, say=self.said.append, **options)

    def lead(self, wait: float = 20) -> LeaderEnd:
        return lead(self, HERE, self.beating, wait)

    def follow_to_the_end(self, at: str = HERE) -> list[Order]:
        """Answers each order with the rank and the sum of x, until rank 0 ends."""
        taken = []
        with follow(self, at, self.beating) as follower:
            while order := follower.take():
                taken.append(order)
                follower.answer({"rank": self.rank, "sum": float(order.arrays["x"].sum())})
        return taken


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def together(pool: ThreadPoolExecutor, ring: Ring) -> tuple[LeaderEnd, list[Future]]:
    """Rank 0's end, and the others in threads, which follow to the end."""
    leading = pool.submit(Rank(ring, 0).lead)
    followers = [pool.submit(Rank(ring, rank).follow_to_the_end) for rank in range(1, ring.size)]
    return leading.result(30), followers


def test_orders_reach_every_rank_in_their_order_and_answers_come_in_that_of_ranks(pool):
    leader, followers = together(pool, Ring(4))
    with leader:
        for number in range(5):
            leader.give(Order("count", {"number": number}, {"x": np.full(3, number, np.int32)}))
        answers = [leader.answers() for _ in range(5)]
    assert answers == [[{"rank": rank, "sum": 3.0 * number} for rank in (1, 2, 3)] for number in range(5)]
    for follower in followers:
        assert [order.fields["number"] for order in follower.result(30)] == list(range(5))
    assert leader.hosts == (platform.node(),) * 4


def test_answers_that_nobody_asks_for_are_skipped(pool):
    leader, followers = together(pool, Ring(3))
    with leader:
        for number in range(3):
            leader.give(Order("count", {"number": number}, {"x": np.full(3, number, np.int32)}))
        for _ in range(2):
            leader.leave_answers()
        assert leader.answers() == [{"rank": rank, "sum": 6.0} for rank in (1, 2)]
    for follower in followers:
        follower.result(30)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), SystemExit(0), SystemExit(130)])
def test_the_others_take_none_once_rank_0_has_ended_well(pool, error):
    leader, followers = together(pool, Ring(2))
    leader.__exit__(error and type(error), error, None)
    assert followers[0].result(30) == []


def test_strangers_are_turned_away_and_do_no_harm(pool):
    held = []

    def meet_strangers(array: np.ndarray) -> None:
        port, token = int(array[0]), array[1:].astype(np.uint8).tobytes()
        for words in (
            b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4096, token[:20],
            bytes(TOKEN) + b"\0\1\0\0" + bytes(64), token + b"\0\7\0\0" + bytes(64),
            token + b"\0\1\0\2" + bytes(64), token + b"\0\0\0\0" + bytes(64),
        ):  # fmt: skip
            held.append(socket.create_connection((HERE, port)))
            held[-1].sendall(words)
            if words:
                held[-1].shutdown(socket.SHUT_WR)  # so that the test ends where one is let in
        for _ in range(100):  # that say nothing, and come before the ranks
            held.append(socket.create_connection((HERE, port)))

    leader, followers = together(pool, Ring(3, meet_strangers))
    with leader:
        leader.give(Order("count", {}, {"x": np.ones(2, np.int32)}))
        assert leader.answers() == [{"rank": 1, "sum": 2.0}, {"rank": 2, "sum": 2.0}]
    assert [len(follower.result(30)) for follower in followers] == [1, 1]
    for stranger in held:
        stranger.settimeout(20)
        with suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
        stranger.close()


def test_of_many_strangers_those_that_came_first_are_turned_away_at_once(pool):
    ports: Queue[int] = Queue()
    may_come = threading.Event()

    class Late(Rank):
        def all_gather(self, array: mx.array) -> mx.array:
            found = super().all_gather(array)
            assert may_come.wait(20)
            return found

    ring = Ring(2, lambda array: ports.put(int(array[0])))
    leading, following = pool.submit(Rank(ring, 0).lead), pool.submit(Late(ring, 1).follow_to_the_end)
    with ExitStack() as stack:
        port = ports.get(timeout=20)
        strangers = [stack.enter_context(socket.create_connection((HERE, port), 20)) for _ in range(80)]
        assert strangers[0].recv(1) == b""
        may_come.set()
        with leading.result(30):
            pass
    assert following.result(30) == []


def test_nobody_is_let_in_once_all_ranks_are_there(pool):
    ports = []
    leader, _ = together(pool, Ring(2, lambda array: ports.append(int(array[0]))))
    with leader, pytest.raises(ConnectionRefusedError):
        socket.create_connection((HERE, ports[0]))


def test_the_token_is_long_and_another_one_each_time(pool):
    seen = []
    for _ in range(2):
        leader, _ = together(pool, Ring(2, lambda array: seen.append(array[1:].tobytes())))
        leader.__exit__(None, None, None)
    assert TOKEN >= 16 and seen[0] != seen[1]


def test_rank_0_listens_at_the_one_address_that_it_is_given_and_names_who_does_not_come():
    found = []

    def knock_elsewhere(array: np.ndarray) -> None:
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", int(array[0])), 5):
            pass
        found.append(array)

    with refused("control_failed", "rank 1 and 2", HERE):
        Rank(Alone(3, knock_elsewhere), 0).lead(0.1)
    assert found


def test_an_address_that_is_not_this_machines_is_an_error_on_all_ranks(pool):
    ring = Ring(2)
    following = pool.submit(Rank(ring, 1).follow_to_the_end, "192.0.2.1")
    with refused("control_failed", "rank 0", "192.0.2.1"):
        lead(Group(ring, 0), "192.0.2.1")
    with refused("control_failed", "rank 1", "192.0.2.1"):
        following.result(30)
