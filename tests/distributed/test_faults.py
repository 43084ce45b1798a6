"""One rank of several processes dies, hangs, stalls or fails: one line, the same end on all ranks, in time."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("rank_program.py")
LAUNCH = Path(sys.executable).with_name("mlx.launch")
SECONDS = 100  # after which a test fails whose processes go on; what they do takes up to 15


@dataclass
class Ended:
    """statuses, by rank, of those that ended by themselves. lines: standard error of all, but for blank ones."""

    statuses: list[int]
    lines: list[str]
    output: str


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def started(kind: str, when: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), kind, when], env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(folder: Path, size: int, kind: str, when: str = "within") -> Ended:
    """Ranks that are started by hand. One that is stopped for ever is killed once the others have ended."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    environment = os.environ | {"MLX_HOSTFILE": str(hosts), "PYTHONPATH": str(ROOT)}
    ranks = [started(kind, when, environment | {"MLX_RANK": str(rank)}) for rank in range(size)]
    victim = ranks[0 if kind.endswith("0") else -1]
    try:
        until = time.monotonic() + SECONDS
        for rank in ranks:
            if not (kind.startswith("stopped") and rank is victim):
                rank.wait(max(0.0, until - time.monotonic()))
        if kind.startswith("stopped"):
            victim.send_signal(signal.SIGCONT)  # it finds what the others had to say
            victim.wait(SECONDS)
        told = [rank.communicate(timeout=SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    lines = [line for _, errors in told for line in errors.splitlines() if line]
    return Ended([rank.returncode for rank in ranks], lines, "".join(output for output, _ in told))


@pytest.mark.core(1)
@pytest.mark.parametrize("kind, when, statuses, told", [
    ("killed", "within", [1, -9], "rank 1 .* has ended without a word"),
    ("killed", "between", [1, -9], "rank 1 .* has ended without a word"),
    ("killed0", "within", [-9, 1], "rank 0 .* has ended without a word"),
    ("killed0", "between", [-9, 1], "rank 0 .* has ended without a word"),
    ("killed", "within", [1, 1, -9], "rank 2 .* has ended without a word"),
    ("killed0", "within", [-9, 1, 1], "rank 0 .* has ended without a word"),
    ("stopped", "within", [1, 1], "rank 1 .* has not been heard from for 10 s"),
    ("stopped", "between", [1, 1], "rank 1 .* has not been heard from for 10 s"),
    ("stopped0", "within", [1, 1, 1], "rank 0 .* has not been heard from for 10 s"),
    ("failed", "within", [1, 1], r"rank 1 .* failed: ValueError: a layer is missing \(rank_program.py:\d+\)"),
    ("failed", "between", [1, 1, 1], r"rank 2 .* failed: ValueError: a layer is missing \(rank_program.py:\d+\)"),
    ("terminated", "within", [1, 143], "rank 1 .* failed: it was ended by SIGTERM"),
])  # fmt: skip
def test_a_fault_ends_all_ranks_with_one_line(tmp_path, kind, when, statuses, told):
    ended = run(tmp_path, len(statuses), kind, when)
    assert ended.statuses == statuses, ended
    assert len(ended.lines) == 1 and re.match(f"mlx_qwen35: {told}", ended.lines[0]), ended
    assert "done" not in ended.output


@pytest.mark.full
@pytest.mark.parametrize("kind, size", [("none", 2), ("stalled", 2), ("stalled0", 3)])
def test_ranks_end_in_silence_also_after_a_stall_of_5_seconds(tmp_path, kind, size):
    ended = run(tmp_path, size, kind)
    assert ended == Ended([0] * size, [], f"done {list(range(1, size))}\n")


@pytest.mark.full
def test_of_what_is_written_to_standard_error_only_the_lines_of_mlxs_backends_are_left_out(tmp_path):
    ended = run(tmp_path, 2, "noisy")
    assert sorted(ended.lines) == ["Python's", "native"] and ended.statuses == [0, 0]


@pytest.mark.full
@pytest.mark.parametrize("kind, statuses, told", [
    ("interrupted0", [-2, 0, 0], "KeyboardInterrupt"), ("terminated0", [143, 1, 1], ""),
    ("failed0", [1, 1, 1], "is missing"),
])  # fmt: skip
def test_the_others_end_in_silence_with_rank_0_that_is_ended_or_tells_its_own_error(tmp_path, kind, statuses, told):
    ended = run(tmp_path, len(statuses), kind)
    assert ended.statuses == statuses, ended
    assert ended.lines[-1:] == [line for line in ended.lines if told and told in line][-1:], ended
    assert not any(line.startswith("mlx_qwen35:") for line in ended.lines)


@pytest.mark.full
@pytest.mark.parametrize("kind, told", [("killed", "rank 2"), ("killed0", "rank 0"), ("failed", "rank 2")])
def test_mlx_launch_shows_one_line_too(kind, told):
    port = str(free_ports(1)[0])
    launch = [str(LAUNCH), "-n", "3", "--backend", "ring", "-p", port, "--"]
    ended = subprocess.run(
        [*launch, sys.executable, str(PROGRAM), kind, "within"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    lines = [line for line in ended.stderr.splitlines() if "Node with rank" not in line]  # mlx.launch's own
    assert len(lines) == 1 and lines[0].startswith(f"mlx_qwen35: {told} ("), ended
