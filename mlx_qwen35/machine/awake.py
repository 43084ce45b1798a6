"""Keeps a Mac awake while it works."""

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from typing import Protocol


class Process(Protocol):
    """What is needed of a program that runs."""

    def terminate(self) -> None: ...
    def wait(self) -> int: ...


Run = Callable[[Sequence[str]], Process]


def _run(command: Sequence[str]) -> Process:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


HERE: Run | None = _run if platform.system() == "Darwin" else None

class Awake:
    """Lets this Mac sleep, or not. Elsewhere it does nothing.

    The system's caffeinate runs while there is work. It watches this process, so that it is never left behind.

    Args:
        run: starts a program. None: this machine has no caffeinate.
    """

    def __init__(self, run: Run | None = HERE):
        self._run = run
        self._caffeinate: Process | None = None

    def set(self, working: bool) -> None:
        """Whether there is work from now on."""
        if working and self._run and not self._caffeinate:
            try:
                self._caffeinate = self._run(["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())])
            except OSError:
                self._run = None  # a system without it
        elif not working and self._caffeinate:
            self._caffeinate.terminate()
            self._caffeinate.wait()
            self._caffeinate = None
