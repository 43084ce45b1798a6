"""Which of several ranks this process is, by what mlx.launch has put into its environment."""

import hashlib
import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

SECONDS = 60.0  # that ranks may differ in when they come


@dataclass(frozen=True)
class Place:
    """A rank among `size`, joined by a backend of MLX. ring: host:port of each, where the backend is the ring."""

    rank: int
    size: int
    backend: str
    ring: Sequence[str] = ()


def this_place() -> Place | None:
    """Of this process; None for one that is alone. InputError for a backend that ranks of a model do not run over."""
    rank = os.environ.get("MLX_RANK", "")
    if not rank.isdigit():
        return None
    if "MLX_JACCL_COORDINATOR" in os.environ:
        size, ring = len(_listed("MLX_IBV_DEVICES")), []
    else:
        ring = [addresses[0] for addresses in _listed("MLX_HOSTFILE")]
        size = len(ring) or int(os.environ.get("MLX_WORLD_SIZE", "1"))
    if size < 2 and rank == "0":
        return None
    if (not ring and "MLX_JACCL_COORDINATOR" not in os.environ) or int(rank) >= size:
        raise InputError(
            "option_invalid",
            f"ranks of a model must be started by mlx.launch --backend ring, or jaccl; MLX_RANK is {rank}, and "
            f"{size} ranks are told of by MLX_HOSTFILE or MLX_IBV_DEVICES",
        )
    return Place(int(rank), size, "ring" if ring else "jaccl", ring)


def _listed(variable: str) -> list[list[str]]:
    """The list of lists in the file that a variable names; empty where there is none, as for one rank."""
    if variable not in os.environ:
        return []
    try:
        text = Path(os.environ[variable]).read_text(encoding="utf-8").strip()
        found = json.loads(text) if text else []
        if isinstance(found, list) and all(isinstance(each, list) and each for each in found):
            return found
        why = f"got {shown(found)}"
    except (OSError, ValueError) as error:
        why = str(error)
    raise InputError("option_invalid", f"{variable} must name a file with a JSON list for each rank: {why}")


def check_ring(place: Place, watch: Callable[[], object] = lambda: None, seconds: float = SECONDS) -> None:
    """Wait until this rank reaches the next one and is reached by the one before, at the ports that the ring will use.

    The ring itself waits without end where one of them cannot be reached, and no signal or thread of Python runs then.
    watch: called while it waits; it raises where waiting is in vain.

    Raises InputError peer_unreachable, which names the rank and its address.
    """
    after, before = (place.rank + 1) % place.size, (place.rank - 1) % place.size
    until = time.monotonic() + seconds

    def wait(lacking: int, how: str) -> None:
        watch()
        if time.monotonic() > until:
            raise InputError(
                "peer_unreachable",
                f"rank {lacking} {how} {place.ring[lacking]} within {seconds:.0f} s. A firewall must let the ranks "
                "reach each other's ports",
            )

    with ExitStack() as opened:
        right = left = None
        with _listening(place.ring[place.rank]) as listener:
            while not (right and left):
                if right is None:
                    wait(after, "cannot be reached at")
                    right = _reached(place, after)
                else:
                    wait(before, "does not reach this one from")
                if left is None and select.select([listener], [], [], 0.02 if right is None else 0.2)[0]:
                    left = _heard(listener, _hello(place, place.rank))
            opened.enter_context(right)
            opened.enter_context(left)
        left.sendall(_MET)  # none may mistake the ring's port for this one: all go on once both neighbours have met
        while not select.select([right], [], [], 0.2)[0]:
            wait(after, "has not met its neighbours at")
        with suppress(OSError):
            if right.recv(1) == _MET:
                return
        watch()
        raise InputError("peer_unreachable", f"rank {after} at {place.ring[after]} ended before the ranks had met")


_MET = b"1"


def _hello(place: Place, rank: int) -> bytes:
    """What a rank of this ring is greeted with by the one before it, and by nothing else."""
    return hashlib.sha256(f"{rank} of {place.ring}".encode()).digest()


def _listening(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        return socket.create_server((host, int(port)))
    except OSError as error:
        raise InputError(
            "address_unusable", f"this rank must be able to listen on {address}: {error.strerror or error}"
        ) from error


def _reached(place: Place, rank: int) -> socket.socket | None:
    """A connection to a rank that is there, and has been greeted."""
    host, _, port = place.ring[rank].rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=1)
        if connection.getsockname() != connection.getpeername():
            connection.sendall(_hello(place, rank))
            return connection
        # None listens yet at this port of this machine, and the system gave it to this end. It must be free at once.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    except OSError:
        pass
    return None


def _heard(listener: socket.socket, hello: bytes) -> socket.socket | None:
    """A connection that begins with the hello. A stranger's is closed."""
    with ExitStack() as opened, suppress(OSError):
        connection = opened.enter_context(listener.accept()[0])
        connection.settimeout(5)
        if connection.recv(len(hello), socket.MSG_WAITALL) == hello:
            opened.pop_all()
            return connection
    return None
