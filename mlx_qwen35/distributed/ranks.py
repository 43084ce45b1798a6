"""The ranks that this process has joined: as rank 0, whose program goes on, or as one that follows until that ends."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from mlx_qwen35.distributed.connecting import follow, lead
from mlx_qwen35.distributed.control import LeaderEnd
from mlx_qwen35.distributed.group import Group
from mlx_qwen35.distributed.handover import close_input
from mlx_qwen35.distributed.hosts import HERE, hostfile_of
from mlx_qwen35.distributed.launch import Launch
from mlx_qwen35.distributed.place import SECONDS, Place, check_ring, this_place
from mlx_qwen35.distributed.ring import ended_after, is_collective, open_group
from mlx_qwen35.distributed.serving import obey
from mlx_qwen35.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """Rank 0's view. hosts: a name of each rank's machine. launch: what started the others; None: not this process."""

    place: Place
    group: Group
    leader: LeaderEnd
    hosts: Sequence[str]
    launch: Launch | None = None


MEETING = 15.0  # seconds that ranks which have met may take to join
_joined: Ranks | None = None  # of this process: MLX joins ranks once
_LOCK = threading.Lock()


def ranks() -> Ranks | None:
    """What this process leads; None for one that is alone."""
    return _joined


def join(hosts: Sequence[str] | None = None) -> Ranks:
    """Lead the ranks that mlx.launch has started with this one, or start one on each of these hosts.

    In a process of mlx.launch that is not rank 0 this does not return: it follows, and ends with rank 0.

    Raises InputError peer_unreachable and control_failed where the ranks cannot meet; option_conflict for hosts in a
    process of mlx.launch; option_missing without either.
    """
    global _joined
    with _LOCK:
        place, launch = this_place(), None
        if _joined and not (hosts and place and _joined.launch is None):
            return _joined
        if hosts and place:
            raise InputError(
                "option_conflict",
                f"--with must not be given to ranks that mlx.launch has started; here are {place.size}. Leave it out",
            )
        if hosts:
            launch = Launch(hostfile_of(hosts))
            place = this_place()
        if place is None:
            raise InputError(
                "option_missing",
                "the other machines must be given (--with, in Python hosts), or the ranks be started by mlx.launch",
            )
        if place.rank:
            serve(place)
        others = [host.name for host in launch.hosts[1:]] if launch else [f"rank {own}" for own in range(1, place.size)]
        try:
            with _meeting(place, others, launch.watch if launch else lambda: None) as group:
                leader = lead(group, _address(place), others=others if launch else None)
        except BaseException:
            if launch:
                launch.close()
            raise
        others = others if launch else list(leader.hosts[1:])
        if launch:
            launch.settled()
        _joined = Ranks(place, group, leader, ["this machine", *others], launch)
        atexit.register(leave)
        return _joined


@contextmanager
def _meeting(place: Place, others: Sequence[str], watch: Callable[[], object] = lambda: None) -> Iterator[Group]:
    """The ranks, once all are there. In the block the control channel is opened; with that this process is bound to end
    in time, since nothing but the heartbeat finds a rank that is lost. others: names for the message.
    """
    if place.ring:
        check_ring(place, watch)
    seconds = MEETING if place.ring else SECONDS
    line = f"mlx_qwen35: {' or '.join(others)} has ended or hangs: the ranks did not join within {seconds:g} s"
    try:
        with ended_after(seconds + 5 * bool(place.rank), line):  # rank 0 tells it first
            yield open_group(place.backend)
    except RuntimeError as error:
        if not is_collective(error):
            raise
        raise InputError(
            "peer_unreachable", f"{' or '.join(others)} has ended before the ranks had joined: {error}"
        ) from error


def _address(place: Place) -> str:
    """By which the others reach rank 0."""
    first = place.ring[0] if place.ring else os.environ["MLX_JACCL_COORDINATOR"]
    return first.rpartition(":")[0] or HERE


def serve(place: Place) -> NoReturn:
    """Follow rank 0 until it ends, and end this process. It reads and prints nothing."""
    close_input()
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's affair
    with _meeting(place, ["rank 0"]) as group:
        follower = follow(group, _address(place))
    with follower:
        obey(group, follower)
    _end(0)


def _end(status: int) -> NoReturn:
    """End this process at once: other threads, and what the program would do at its end, are of no use here."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave(error: BaseException | None = None) -> None:
    """Rank 0 ends: the others do. error: that it ends with."""
    global _joined
    found, _joined = _joined, None
    if found:
        try:
            found.leader.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        finally:
            if found.launch:
                found.launch.close()


@contextmanager
def as_rank(command: str, spreads: bool) -> Iterator[None]:
    """The block is a command's run. Started by mlx.launch it is rank 0's; in the others the process follows instead.

    spreads: whether the command can use other ranks. If not, rank 0 raises InputError ranks_unsupported, and the others
    end in silence.
    """
    place = this_place()
    if place and not spreads:
        if place.rank:  # mlx.launch ends this one once rank 0 has told why, and would end that if this one were first
            time.sleep(SECONDS)
            _end(2)
        raise InputError(
            "ranks_unsupported",
            f"{command} must run alone: it computes on one machine. mlx.launch has started {place.size} ranks",
        )
    if place:
        join()
    try:
        yield
    except BaseException as error:
        leave(error)
        raise
    leave()
