"""Rank 0's seat for the option --with: it gives its place to the process that the user started, which waits at a
socket, and stays until that has ended.

mlx.launch runs this file by its path: it imports nothing of the package, and is there at once.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

PATIENCE = 10.0  # seconds for mlx.launch to end the other ranks
END = b"end\n"  # what the process that took the place says when all is well
VARIABLES = ("MLX_RANK", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING")
FILES = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # of these, names of files


def hand_over(path: str) -> int:
    """Give the environment of this place to the process at a socket. Its end ends this: 1 where it did not say so, by
    which mlx.launch ends the other ranks. Then its folder, where the socket is, is removed here, and what mlx.launch
    cannot end is killed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    files = {name: Path(found.pop(name)).read_text(encoding="utf-8") for name in FILES if name in found}
    said = b""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(json.dumps([found, files]).encode() + b"\n")
            while got := connection.recv(64):
                said += got
    finally:
        if said != END:
            shutil.rmtree(Path(path).parent, ignore_errors=True)
            _kill_what_hangs()
    return 0 if said == END else 1


def _kill_what_hangs() -> None:
    """A child, once this has ended: mlx.launch waits for ever for a rank that is stopped, or a machine that hangs."""
    if os.fork():
        return
    launch, until = os.getpgrp(), time.monotonic() + PATIENCE
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(launch, 0)
            time.sleep(0.1)
    os.killpg(launch, signal.SIGKILL)


def close_input() -> None:
    """mlx.launch writes what it reads to all ranks, and waits actively while it could: it stops where none reads."""
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that the user started
    close_input()
    sys.exit(hand_over(sys.argv[1]))
