"""What mlx.launch runs on every machine for the option --with: python -m mlx_qwen35.distributed.seat SOCKET

Rank 0's seat gives its place to the process that the user started, which waits at the socket, and stays until that has
ended. On the other machines it is the rank itself.
"""

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

from mlx_qwen35.distributed.place import END, FILES, VARIABLES, close_input, this_place


def hand_over(path: str) -> int:
    """Give the environment of this place to the process at a socket. Its end ends this: 1 where it did not say so, by
    which mlx.launch ends the other ranks. Then its folder, where the socket is, is removed here.
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
    return 0 if said == END else 1


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that the user started
    close_input()
    if os.environ["MLX_RANK"] == "0":
        sys.exit(hand_over(sys.argv[1]))
    from mlx_qwen35.distributed.ranks import serve  # late, since rank 0's seat needs none of it

    place = this_place()
    assert place, "mlx.launch has started this"
    serve(place)


if __name__ == "__main__":
    main()
