"""How several machines end: one of them is killed or stopped, in each part of a run. Real processes over loopback."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed.starting import ROOT, SECONDS, environment, processes, run

HERE = "127.0.0.1"
FAULTS = Path(__file__).with_name("faults")
PREFILL, DECODE = 1, 12  # passes


def with_fault(rank: int, function: str, signal: str, count: int = 1) -> dict[str, str]:
    return environment(FAULT=f"{rank} {function} {signal} {count}", PYTHONPATH=f"{FAULTS}:{ROOT}")


def told_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on standard error, without those of progress that a slow machine shows."""
    return [line for line in done.stderr.splitlines() if not line.endswith(" ...")]


def gone() -> None:
    """Every process of a start by --with ends soon, also one that is stopped."""
    until = time.monotonic() + 40
    while (left := [*processes("distributed.seat"), *processes("handover.py")]) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("when", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize(("sent", "told"), [("SIGKILL", "ended without a word"), ("SIGSTOP", "not been heard from")])
def test_a_machine_that_is_lost_in_an_answer_ends_the_command_in_one_line(size, when, sent, told):
    hosts, own = ",".join([HERE] * (size - 1)), with_fault(size - 1, "ObeyingRank._pass", sent, when)
    done = run("--prompt", "What is 34 + 58?", "--with", hosts, env=own)
    assert done.returncode == 1
    (line,) = told_of(done)
    assert re.match(rf"mlx_qwen35: rank {size - 1} \(.+\) .*{told}", line), line
    gone()


@pytest.mark.full
@pytest.mark.parametrize(("function", "status", "told"), [
    ("serve", 2, f"{HERE} cannot take part: it ended with code -9"),
    ("check_ring", 2, f"{HERE} cannot take part: it ended with code -9"),
    ("open_group", 1, f"{HERE} has ended or hangs: the ranks did not join within 15 s"),
    ("follow", 2, "rank 1 did not connect"),
    ("_Rank._open", 1, r"rank 1 \(.+\) has ended without a word"),
    ("_Rank._load", 1, r"rank 1 \(.+\) has ended without a word"),
    ("_Rank._room", 1, r"rank 1 \(.+\) has ended without a word"),
])  # fmt: skip
def test_a_machine_that_is_killed_in_the_start_ends_the_command_in_one_line(function, status, told):
    done = run("--prompt", "Hi", "--with", HERE, env=with_fault(1, function, "SIGKILL"))
    (line,) = told_of(done)
    assert done.returncode == status and re.search(told, line), done.stderr
    gone()


@pytest.mark.full
@pytest.mark.parametrize("function", [
    "Launch._taken", "check_ring", "open_group", "_Door.admit_all", "Spreading._loaded", "LeadingModel._pass",
])  # fmt: skip
def test_rank_0_that_is_killed_leaves_nothing_behind(function, tmp_path):
    own = with_fault(0, function, "SIGKILL") | {"TMPDIR": str(tmp_path)}
    assert run("--prompt", "Hi", "--with", HERE, env=own).returncode == -signal.SIGKILL
    until = time.monotonic() + 40  # what was just started has no name yet
    while list(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []
    gone()


@pytest.mark.full
def test_a_run_leaves_no_file_behind_in_a_folder_of_a_long_name_too(tmp_path):
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    for folder in (tmp_path, deep):
        before = set(folder.iterdir())
        done = run("--prompt", "Hi", "--with", HERE, env=environment(TMPDIR=str(folder)))
        assert done.returncode == 0 and set(folder.iterdir()) == before, done.stderr


@pytest.mark.full
def test_ctrl_c_under_mlx_launch_ends_every_rank_without_a_fault_of_one():
    """The terminal's SIGINT reaches mlx.launch and both ranks."""
    command = [sys.executable, "-m", "mlx_qwen35.generate", "--model", "nano", "--prompt", "Hi", "--temp", "0"]
    own = with_fault(0, "LeadingModel._pass", "SIGSTOP", 5)
    with subprocess.Popen(
        ["mlx.launch", "-n", "2", "--backend", "ring", "--", *command], env=own, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as launched:  # fmt: skip
        assert launched.stdout
        launched.stdout.readline()  # rank 0 answers, and stops there
        for number in (signal.SIGINT, signal.SIGCONT):
            os.killpg(launched.pid, number)
        _, errors = launched.communicate(timeout=SECONDS)
    assert "mlx_qwen35" not in errors.replace("mlx_qwen35/", ""), errors
    assert "rank 0 exited with code 130" in errors and "rank 1" not in errors, errors


@pytest.mark.full
def test_a_wait_that_holds_pythons_lock_ends_with_a_line():
    program = (
        "import ctypes\n"
        "from mlx_qwen35.distributed.ring import ended_after\n"
        "with ended_after(30, 'never'): pass\n"
        "with ended_after(0.2, 'mini hangs: 100 %'): ctypes.PyDLL(None).sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (1, "mini hangs: 100 %\n")
