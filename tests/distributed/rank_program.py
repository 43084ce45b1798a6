"""A rank that faults are made in: python rank_program.py FAULT. Ranks sum arrays without end; rank 0 ends after 300.

FAULT: none, or what happens behind the 100th sum, to the last rank, or with a 0 at its end to rank 0.
"""

import os
import signal
import subprocess
import sys
import time

import mlx.core as mx

from mlx_qwen35.distributed.channel import Follower, Order
from mlx_qwen35.distributed.connecting import follow, lead
from mlx_qwen35.distributed.group import Group
from mlx_qwen35.distributed.ring import open_group

HERE = "127.0.0.1"


def fault(kind: str) -> None:
    match kind.rstrip("0"):
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "stalled":
            wake = f"sleep 5; kill -CONT {os.getpid()}"
            subprocess.Popen(["/bin/sh", "-c", wake], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            os.kill(os.getpid(), signal.SIGSTOP)
        case "failed":
            raise ValueError("a layer\nis missing")
        case "noisy":
            os.write(2, b"[ring] Socket 3 was closed by the peer\nnative\n[jaccl] Recv failed\n")
            print("Python's", file=sys.stderr)
        case "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        case "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the heartbeat ends the process


def sums(group: Group, kind: str, count: int) -> None:
    """In each a collective, as in a step of a model. The victim's fault comes while the others wait for it."""
    victim = 0 if kind.endswith("0") else group.size - 1
    array = mx.ones(1000)
    for number in range(count):
        if number == 100 and group.rank == victim:
            time.sleep(0.2)
            fault(kind)
        array = group.all_sum(array) / group.size
        mx.eval(array)


def obey(group: Group, follower: Follower, kind: str) -> None:
    while order := follower.take():
        if order.name == "sums":
            sums(group, kind, 300)
            follower.answer({"done": group.rank})
        elif group.rank == group.size - 1 and not kind.endswith("0"):
            fault(kind)


def main() -> None:
    kind, when = sys.argv[1:3]
    group = open_group("ring")
    if group.rank:
        with follow(group, HERE) as follower:
            obey(group, follower, kind)
        return
    with lead(group, HERE) as leader:
        if when == "between":
            leader.give(Order("pause"))
            time.sleep(1)
            if kind.endswith("0"):
                fault(kind)
        leader.give(Order("sums"))
        sums(group, kind if when == "within" else "none0", 300)
        print("done", [answer["done"] for answer in leader.answers()], flush=True)


if __name__ == "__main__":
    main()
