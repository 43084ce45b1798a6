"""Signs of life between rank 0 and each other rank: a peer that dies or hangs ends every rank, with one line in all.

A thread sends a beat a second over a socket of its own and listens for those of its peers. It works while the main
thread waits in a collective, since MLX gives up Python's lock there. Rank 0 tells of a fault where it can, and rank 1
where rank 0 is what was lost; the others end in silence.
"""

import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from mlx_qwen35.machine.terminal import sane_terminal
from mlx_qwen35.values import shown

FAILED = 1  # exit status of every rank after a fault
_BEAT = b"\n"
_MOST_WORDS = 1 << 16  # bytes of a line
_MOST_REASON = 1000  # characters


@dataclass(frozen=True)
class Pace:
    """Seconds."""

    beat: float = 1.0  # between two beats
    silence: float = 10.0  # after which a peer counts as lost
    leave: float = 2.0  # that a process has for its own end after a goodbye, or for sending its last words
    grace: float = 0.5  # from SIGTERM to the end: mlx.launch sends it where a peer was lost, which is told first


PACE = Pace()


@dataclass(frozen=True)
class Peer:
    """host: its name, for messages. connection: which nothing but beats and last words go over."""

    host: str
    connection: socket.socket


def tell(line: str) -> None:
    """One line on standard error, from any thread, over a progress line that may stand there."""
    with suppress(OSError, ValueError):
        erase = "\r\x1b[K" if sys.stderr.isatty() else ""
        os.write(sys.stderr.fileno(), f"{erase}mlx_qwen35: {line}\n".encode())


def sigterm_as_bytes() -> socket.socket | None:
    """Where the numbers of signals are read from now on, SIGTERM's too, which then ends no process by itself: of the
    main thread, which may wait in a collective, Python asks nothing for that. None where SIGTERM means something else.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return None
    read, written = socket.socketpair()
    for end in (read, written):
        end.setblocking(False)
    signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _noted)
    return read


def _noted(*_: object) -> None:
    """SIGTERM, of which the heartbeat reads."""


class Heartbeat:
    """The beats of one rank. Rank 0 has every other rank as a peer, the others have rank 0.

    end: ends the process with a status; os._exit, since the main thread may wait in a collective for ever. say: gets
    the one line. signals: of `sigterm_as_bytes`. unseen: whether nobody sees what other ranks write, so that rank 0
    tells what they have told too.
    """

    def __init__(
        self,
        rank: int,
        peers: Mapping[int, Peer],
        pace: Pace = PACE,
        end: Callable[[int], object] = os._exit,
        say: Callable[[str], object] = tell,
        signals: socket.socket | None = None,
        unseen: bool = False,
    ):
        self._unseen = unseen
        self._rank, self._peers, self._pace, self._end, self._say = rank, dict(peers), pace, end, say
        self._signals, self._ends_at = signals, float("inf")
        self._over, self._lock = threading.Event(), threading.Lock()
        self._status, self._ends = FAILED, False
        self._pending = dict.fromkeys(peers, b"")
        for peer in peers.values():
            peer.connection.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def goodbye(self) -> None:
        """Rank 0 ends well: every other rank ends with 0, and says nothing."""
        self._settle(0)
        self._thread.join()

    def give_up(self) -> None:
        """Rank 0 ends with an error that it tells itself: every other rank ends with 1, and says nothing."""
        self._settle(FAILED)
        self._thread.join()

    def fail(self, reason: str) -> None:
        """This rank ends with an error: rank 0 tells the reason, and every rank ends with 1. Ends this process."""
        if self._rank:
            self._settle(FAILED, reason, ends=True)
        else:
            self._fault(f"rank 0 failed: {' '.join(reason.split())[:_MOST_REASON]}")
        self._thread.join()

    def lost(self, reason: str) -> None:
        """What the main thread does when a collective or an order breaks: the fault that the beats find is told, or
        this reason if they find none. Ends this process.
        """
        if not self._over.wait(self._pace.silence + self._pace.beat):
            if self._rank:
                self.fail(reason)
            self._fault(reason)
        self._thread.join()

    def ended_well(self) -> bool:
        """Whether rank 0 has said goodbye, which is known once the orders end."""
        return self._over.wait(self._pace.silence + self._pace.beat) and self._status == 0

    def _run(self) -> None:
        heard = dict.fromkeys(self._peers, time.monotonic())
        beats_at = 0.0
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer.connection, selectors.EVENT_READ, rank)
            if self._signals:
                selector.register(self._signals, selectors.EVENT_READ)
            while not self._over.is_set():
                now = time.monotonic()
                if now >= beats_at:
                    self._send(_BEAT)
                    beats_at = now + self._pace.beat
                for key, _ in selector.select(max(0.0, min(beats_at, self._ends_at) - now)):
                    if key.data is None:
                        self._hear_signal()
                    else:
                        heard[key.data] = time.monotonic()
                        self._hear(key.data)
                self._judge(heard, now)
        self._part()

    def _judge(self, heard: Mapping[int, float], now: float) -> None:
        """End where it is time to. now: before the peers were last listened to, however long this process lay still."""
        for rank, last in heard.items():
            if now - last > self._pace.silence:
                self._fault(
                    f"{self._named(rank)} has not been heard from for {self._pace.silence:g} s: it hangs, sleeps or "
                    "lacks memory, or the network between is gone"
                )
        if now >= self._ends_at:
            self._settle(128 + signal.SIGTERM, "it was ended by SIGTERM" if self._rank else "", ends=True)

    def _hear_signal(self) -> None:
        assert self._signals
        if signal.SIGTERM in self._signals.recv(64) and signal.getsignal(signal.SIGTERM) is _noted:
            self._ends_at = time.monotonic() + self._pace.grace

    def _hear(self, rank: int) -> None:
        """Read what a peer has sent: lines, empty ones for beats."""
        try:
            content = self._peers[rank].connection.recv(_MOST_WORDS)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if not content:
            return self._fault(f"{self._named(rank)} has ended without a word: it was killed, or lacked memory")
        *lines, self._pending[rank] = (self._pending[rank] + content)[-_MOST_WORDS:].split(b"\n")
        for line in filter(None, lines):
            try:
                words = json.loads(line)
                status, reason, told = int(words["status"]), str(words["reason"]), str(words.get("told", ""))
            except (ValueError, KeyError, TypeError, AttributeError):
                return self._fault(f"{self._named(rank)} sent what are no words: {shown(line)}")
            self._obey(rank, status, reason, told)

    def _obey(self, rank: int, status: int, reason: str, told: str) -> None:
        """Last words of a peer. A reason is for rank 0 to tell; without one it was told, or there is nothing to."""
        if reason:
            self._fault(f"{self._named(rank)} failed: {reason}")
        else:
            self._settle(FAILED if status else 0, ends=True, line=told if self._unseen else "")

    def _fault(self, line: str) -> None:
        """Something broke: rank 0 tells it, rank 1 where that is lost. Ends every process."""
        self._settle(FAILED, ends=True, line=f"{line}. All ranks have ended" if self._rank <= 1 else "")

    def _named(self, rank: int) -> str:
        return f"rank {rank} ({self._peers[rank].host})"

    def _settle(self, status: int, reason: str = "", ends: bool = False, line: str = "") -> None:
        """Once: say the line, tell every peer how it ends, let the beats stop. ends: this process does so, too."""
        with self._lock:
            if self._over.is_set():
                return
            self._status, self._ends = status, ends
            self._over.set()
            if ends:
                sane_terminal()
            if line:
                self._say(line)
            words = {"status": status, "reason": " ".join(reason.split())[:_MOST_REASON], "told": line}
            self._send(json.dumps(words).encode() + b"\n")
            for peer in self._peers.values():
                with suppress(OSError):
                    peer.connection.shutdown(socket.SHUT_WR)

    def _send(self, content: bytes) -> None:
        for peer in self._peers.values():
            with suppress(OSError):  # a full buffer: the peer reads nothing; a broken one is seen when it is read
                peer.connection.send(content)

    def _part(self) -> None:
        """Read until every peer has closed its end, since what a process leaves unread may cost its peer the last
        words; then end this process, where that is settled.
        """
        with self._lock:  # the last words are sent
            until = time.monotonic() + self._pace.leave
        for peer in self._peers.values():
            with suppress(OSError), peer.connection:
                while (left := until - time.monotonic()) > 0:
                    peer.connection.settimeout(left)
                    if not peer.connection.recv(_MOST_WORDS):
                        break
        if self._ends:
            if self._status == 0:
                time.sleep(self._pace.leave)  # for the main thread to end by itself
            self._end(self._status)
