"""Signs of life between ranks, each rank a thread here, with times of their own."""

import json
import os
import socket
import sys
import termios
import threading
import tty
from collections.abc import Iterator

import pytest

from mlx_qwen35.distributed.heartbeat import FAILED, Heartbeat, Pace, Peer
from mlx_qwen35.machine.terminal import sane_terminal

QUICK = Pace(beat=0.02, silence=0.4, leave=0.1, grace=0.05)
SECONDS = 20  # after which a test fails that waits for an end


class Rank:
    """One end: what it said, and with which status it ended."""

    def __init__(self, rank: int, peers: dict[int, socket.socket], unseen: bool = False):
        self.said: list[str] = []
        self.statuses: list[int] = []
        self.ended = threading.Event()
        self.peers = peers
        self.beats = Heartbeat(
            rank, {other: Peer(f"host{other}", end) for other, end in peers.items()}, QUICK, self._end,
            self.said.append, unseen=unseen,
        )  # fmt: skip

    def _end(self, status: int) -> None:
        self.statuses.append(status)
        self.ended.set()
        for end in self.peers.values():
            end.close()

    def ends(self) -> int:
        assert self.ended.wait(SECONDS)
        return self.statuses[0]


@pytest.fixture
def star() -> Iterator[list[Rank]]:
    """Ranks 0, 1 and 2, which beat."""
    pairs = {rank: socket.socketpair() for rank in (1, 2)}
    ranks = [Rank(0, {rank: own for rank, (own, _) in pairs.items()})]
    ranks += [Rank(rank, {0: its}) for rank, (_, its) in pairs.items()]
    yield ranks
    for rank in ranks:
        rank.beats.give_up()
        rank._end(-1)


@pytest.fixture(params=[False])
def mute(request) -> Iterator[tuple[Rank, socket.socket]]:
    """Rank 0, and a peer's end that nobody speaks for."""
    own, its = socket.socketpair()
    rank = Rank(0, {1: own}, request.param)
    yield rank, its
    rank.beats.give_up()
    for end in (own, its):
        end.close()


def test_a_goodbye_ends_the_others_well_and_in_silence(star):
    star[0].beats.goodbye()
    assert [star[1].ends(), star[2].ends()] == [0, 0]
    assert not star[0].statuses and not any(rank.said for rank in star)
    assert star[1].beats.ended_well()


def test_an_error_that_rank_0_tells_itself_ends_the_others_in_silence(star):
    star[0].beats.give_up()
    assert [star[1].ends(), star[2].ends()] == [FAILED, FAILED]
    assert not any(rank.said for rank in star) and not star[1].beats.ended_well()


def test_a_failing_ranks_reason_is_told_once_and_by_rank_0(star):
    star[2].beats.fail("ValueError: of\ntwo lines (x.py:3)")
    assert [rank.ends() for rank in star] == [FAILED] * 3
    assert star[0].said == ["rank 2 (host2) failed: ValueError: of two lines (x.py:3). All ranks have ended"]
    assert not star[1].said and not star[2].said


def test_an_error_of_rank_0_behind_an_order_is_told_at_once_and_ends_all(star):
    star[0].beats.fail("MemoryError: (pipeline.py:3)")
    assert [rank.ends() for rank in star] == [FAILED] * 3
    assert star[0].said == ["rank 0 failed: MemoryError: (pipeline.py:3). All ranks have ended"]
    assert not star[1].said and not star[2].said


def test_a_peer_that_dies_is_told_once_and_by_rank_0(star):
    star[1].peers[0].shutdown(socket.SHUT_RDWR)
    assert [star[0].ends(), star[2].ends()] == [FAILED, FAILED]
    assert len(star[0].said) == 1 and "rank 1 (host1)" in star[0].said[0]
    assert not star[2].said


def test_rank_0_that_dies_is_told_once_and_by_rank_1():
    pairs = {rank: socket.socketpair() for rank in (1, 2)}
    first, second = (Rank(rank, {0: its}) for rank, (_, its) in pairs.items())
    for own, _ in pairs.values():
        own.close()
    assert [first.ends(), second.ends()] == [FAILED, FAILED]
    assert len(first.said) == 1 and "rank 0 (host0)" in first.said[0]
    assert not second.said


def test_a_silent_peer_is_lost(mute):
    rank, _ = mute
    assert rank.ends() == FAILED
    assert len(rank.said) == 1 and "rank 1 (host1) has not been heard from for 0.4 s" in rank.said[0]


def test_a_peer_that_beats_slowly_lives(mute):
    rank, its = mute
    for _ in range(8):
        assert not rank.ended.wait(0.1)
        its.sendall(b"\n")


def test_beats_go_on_when_the_peer_reads_nothing(mute):
    rank, its = mute
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            its.sendall(b"\n" * 20_000)  # more than a read of the other end takes

    thread = threading.Thread(target=beat)
    thread.start()
    assert not rank.ended.wait(1)
    stop.set()
    thread.join()


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1", b"[1]", b'{"status": 0}', b'{"status": "x", "reason": ""}'])
def test_what_are_no_words_are_a_fault_of_the_peer(mute, words):
    rank, its = mute
    its.sendall(words + b"\n")
    assert rank.ends() == FAILED
    assert len(rank.said) == 1 and "rank 1 (host1) sent what are no words" in rank.said[0]


def test_words_that_come_in_pieces_are_heard(mute):
    rank, its = mute
    words = json.dumps({"status": 1, "reason": "it lacks memory"}).encode() + b"\n"
    its.sendall(b"\n\n" + words[:9])
    assert not rank.ended.wait(0.1)
    its.sendall(words[9:])
    assert rank.ends() == FAILED
    assert rank.said == ["rank 1 (host1) failed: it lacks memory. All ranks have ended"]


@pytest.mark.parametrize("mute, says", [(True, True), (False, False)], indirect=["mute"])
def test_what_rank_1_has_told_is_told_again_where_nobody_saw_it(mute, says):
    rank, its = mute
    its.sendall(json.dumps({"status": 1, "reason": "", "told": "rank 0 (host0) was stopped"}).encode() + b"\n")
    assert rank.ends() == FAILED
    assert rank.said == ["rank 0 (host0) was stopped"] * says


def test_a_terminal_in_which_a_prompt_hides_what_is_typed_shows_it_again(monkeypatch):
    master, terminal = os.openpty()
    before = termios.tcgetattr(terminal)[3]
    with os.fdopen(terminal) as stdin, os.fdopen(master):
        monkeypatch.setattr(sys, "stdin", stdin)
        tty.setraw(terminal)
        assert termios.tcgetattr(terminal)[3] != before
        sane_terminal()
        assert termios.tcgetattr(terminal)[3] == before


def test_a_broken_collective_tells_what_the_beats_found(star):
    star[1].peers[0].shutdown(socket.SHUT_RDWR)
    star[0].beats.lost("a collective broke")
    assert star[0].ends() == FAILED
    assert len(star[0].said) == 1 and "rank 1 (host1) has ended without a word" in star[0].said[0]


def test_a_broken_collective_is_told_where_the_beats_find_nothing(star):
    star[2].beats.lost("a collective broke")
    assert [rank.ends() for rank in star] == [FAILED] * 3
    assert star[0].said == ["rank 2 (host2) failed: a collective broke. All ranks have ended"]
