"""Errors of MLX where ranks cannot be joined, each in a process of its own since MLX joins ranks once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qwen35.distributed.ring import is_collective

ROOT = Path(__file__).parents[2]
PROGRAM = """
from mlx_qwen35.distributed.ring import open_group
from mlx_qwen35.errors import InputError
try:
    open_group("ring")
except InputError as error:
    print(error.code, error)
"""


def refusal(**variables: str) -> str:
    """What open_group raises in these surroundings."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    surroundings |= {"PYTHONPATH": str(ROOT), **variables}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=surroundings, capture_output=True, text=True, timeout=60, check=True
    )
    assert not ended.stderr
    return ended.stdout


@pytest.mark.full
@pytest.mark.parametrize("hosts, told", [
    ('[["127.0.0.1:{taken}"], ["127.0.0.1:1"]]', "--starting-port"),
    ('[["192.0.2.1:5000"], ["127.0.0.1:1"]]', "--starting-port"),
    ('[["127.0.0.1"], ["127.0.0.1:1"]]', "MLX_HOSTFILE"),
    ('[["127.0.0.1:5000"], 7]', "MLX_HOSTFILE"),
    ("{{", "MLX_HOSTFILE"),
    ("", "MLX_HOSTFILE"),
])  # fmt: skip
def test_ranks_that_mlx_cannot_join_are_told_what_to_do(tmp_path, hosts, told):
    with socket.create_server(("127.0.0.1", 0)) as server:
        file = tmp_path / "hosts.json"
        file.write_text(hosts.format(taken=server.getsockname()[1]))
        said = refusal(MLX_RANK="0", MLX_HOSTFILE=str(file))
    assert said.startswith("ring_failed MLX cannot join the ranks") and told in said, said


@pytest.mark.full
def test_a_process_that_nothing_has_started_as_a_rank_is_told_how_ranks_start():
    said = refusal()
    assert said.startswith("ring_failed") and "--with HOST" in said, said


def test_errors_of_collectives_are_known_also_behind_others():
    lost = RuntimeError("[ring] connection to a peer was lost")
    other = ValueError("no logits")
    other.__context__ = lost
    assert is_collective(lost) and is_collective(other)
    assert not is_collective(None) and not is_collective(RuntimeError("[matmul] shapes"))
