"""Which of several ranks this process is, by what mlx.launch has put into its environment."""

import json
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.errors import InputError

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
        ring = [str(addresses[0]) for addresses in _listed("MLX_HOSTFILE")]
        size = len(ring) or int(os.environ.get("MLX_WORLD_SIZE", "1"))
    if size < 2:
        return None
    if not ring and "MLX_JACCL_COORDINATOR" not in os.environ:
        raise InputError("option_invalid", "ranks of a model must be started by mlx.launch --backend ring, or jaccl")
    return Place(int(rank), size, "ring" if ring else "jaccl", ring)


def _listed(variable: str) -> list[list[str]]:
    """The list in the file that a variable names; empty where there is none, as for one rank."""
    try:
        text = Path(os.environ[variable]).read_text(encoding="utf-8").strip()
        return list(json.loads(text)) if text else []
    except (KeyError, OSError, ValueError):
        return []


def check_ring(place: Place, watch: Callable[[], object] = lambda: None, seconds: float = SECONDS) -> None:
    """Wait until this rank reaches the next one and is reached by the one before, at the ports that the ring will use.

    The ring itself waits without end where one of them cannot be reached, and no signal or thread of Python runs then.
    watch: called while it waits; it raises where waiting is in vain.

    Raises InputError peer_unreachable, which names the rank and its address.
    """
    after, before = (place.rank + 1) % place.size, (place.rank - 1) % place.size
    until = time.monotonic() + seconds
    with _listening(place.ring[place.rank]) as listener:
        right = left = None
        while not (right and left):
            watch()
            right = right or _reached(place.ring[after])
            if left is None and select.select([listener], [], [], 0.02 if right is None else 0.2)[0]:
                left = listener.accept()[0]
            if time.monotonic() > until and not (right and left):
                lacking = after if right is None else before
                way = "cannot be reached at" if right is None else "does not reach this one from"
                raise InputError(
                    "peer_unreachable",
                    f"rank {lacking} {way} {place.ring[lacking]} within {seconds:.0f} s. A firewall must let the ranks "
                    "reach each other's ports",
                )
    with right, left:  # none may mistake the ring's port for this one, so all go on once both neighbours have closed it
        left.sendall(b"1")
        right.settimeout(seconds)
        if not right.recv(1):
            raise InputError("peer_unreachable", f"rank {after} at {place.ring[after]} ended before the ranks had met")


def _listening(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        return socket.create_server((host, int(port)))
    except OSError as error:
        raise InputError(
            "address_unusable", f"this rank must be able to listen on {address}: {error.strerror or error}"
        ) from error


def _reached(address: str) -> socket.socket | None:
    host, _, port = address.rpartition(":")
    try:
        return socket.create_connection((host, int(port)), timeout=1)
    except OSError:
        return None
