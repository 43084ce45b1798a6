"""What macOS tells of its memory, and that it is kept awake: with the system's part played by the test."""

import ctypes
import os

import pytest

from mlx_qwen35.machine.awake import Awake
from mlx_qwen35.machine.pressure import CRITICAL, NORMAL, WARNING, pressure


@pytest.mark.parametrize(
    ("told", "failed", "expected"),
    [(1, 0, NORMAL), (2, 0, WARNING), (4, 0, CRITICAL), (3, 0, None), (0, 0, None), (1, -1, None)],
)
def test_the_level_is_what_the_system_tells_or_unknown(told, failed, expected):
    def sysctl(name, value, size, new, new_size):
        assert name == b"kern.memorystatus_vm_pressure_level" and new is None
        assert ctypes.cast(size, ctypes.POINTER(ctypes.c_size_t)).contents.value == 4
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int)).contents.value = told
        return failed

    assert pressure(sysctl) == expected


class Caffeinate:
    """The program, as far as it is needed here."""

    def __init__(self, command):
        self.command, self.done = command, []

    def terminate(self):
        self.done.append("terminate")

    def wait(self):
        self.done.append("wait")


def test_one_caffeinate_runs_while_there_is_work_and_watches_this_process():
    started = []
    awake = Awake(lambda command: started.append(Caffeinate(command)) or started[-1])
    for working in (False, True, True, False, False, True):
        awake.set(working)
    assert [process.done for process in started] == [["terminate", "wait"], []]
    assert started[0].command == ["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]


def test_a_system_without_caffeinate_is_asked_once():
    asked = []

    def missing(command):
        asked.append(command)
        raise FileNotFoundError(command[0])

    awake = Awake(missing)
    for working in (True, False, True):
        awake.set(working)
    assert len(asked) == 1
