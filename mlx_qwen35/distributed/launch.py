"""The option --with: mlx.launch starts a seat on every machine, and this process takes the place of rank 0's."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from mlx_qwen35.distributed import handover
from mlx_qwen35.distributed.handover import END, FILES
from mlx_qwen35.distributed.hosts import HERE, Hostfile, unreachable
from mlx_qwen35.distributed.place import SECONDS
from mlx_qwen35.errors import InputError

_ENDED = re.compile(r"Node with rank (\d+) exited with code (-?\d+)")
_LONGEST = 70  # characters of a folder: the name of a socket in it may have 103 on macOS
_PORTS = range(10_000, 32_000)
_COLOURS = re.compile(r"\033\[[0-9;]*m")


class Launch:
    """Seats on these machines, from now until `close`. Whatever ends this process ends them.

    In the environment of this process stands rank 0's place afterwards, as if mlx.launch had started it.
    """

    def __init__(self, hostfile: Hostfile):
        """Raises InputError peer_unreachable, which names the machine, where one of them cannot be started."""
        self.hosts = hostfile.hosts
        self._stack = ExitStack()
        place = None if len(tempfile.gettempdir()) <= _LONGEST else "/tmp"
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx_qwen35-", dir=place)))
        self._said = self._stack.enter_context((self._folder / "said").open("w+b"))
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(self._folder / "seat"))
        listener.listen()
        listener.settimeout(0.1)
        try:
            self._process = self._start(hostfile)
            self._seat = self._taken(listener)
        except BaseException:
            self.close()
            raise

    def _start(self, hostfile: Hostfile) -> subprocess.Popen[bytes]:
        file = self._folder / "hosts.json"
        file.write_text(json.dumps(hostfile.as_json()))
        seats = [[sys.executable, "-P", handover.__file__, str(self._folder / "seat")]]
        seats += [[host.python, "-m", "mlx_qwen35.distributed.seat"] for host in hostfile.hosts[1:]]
        cases = "".join(f"{rank}) exec {shlex.join(seat)};; " for rank, seat in enumerate(seats))
        port = free_ports(hostfile.addresses[0][0] if hostfile.addresses[0] else HERE, len(hostfile.hosts))
        options = ["--hostfile", str(file), "--backend", hostfile.backend, "--starting-port", str(port)]
        return subprocess.Popen(
            [*_launcher(), *options, "--", "/bin/sh", "-c", f"case $MLX_RANK in {cases}esac"],
            stdin=subprocess.PIPE, stdout=self._said, stderr=self._said,
            env=os.environ | {
                "TMPDIR": str(self._folder),  # mlx.launch leaves files behind for each rank
                "PATH": f"{self._without_input('ssh')}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            },
            start_new_session=True,  # Ctrl-C and the terminal are this process's
        )  # fmt: skip

    def _without_input(self, program: str) -> Path:
        """A folder with a program that reads nothing, for the reason of `handover.close_input`."""
        folder = self._folder / "bin"
        folder.mkdir()
        if found := shutil.which(program):
            (folder / program).write_text(f'#!/bin/sh\nexec {shlex.quote(found)} "$@" </dev/null\n')
            (folder / program).chmod(0o700)
        return folder

    def _taken(self, listener: socket.socket) -> socket.socket:
        """The connection with rank 0's seat, whose place this process has then."""
        until = time.monotonic() + SECONDS
        line = b""
        while not line:
            self.watch()
            if time.monotonic() > until:
                raise InputError("peer_unreachable", f"mlx.launch must start within {SECONDS:.0f} s; {self._told()}")
            with suppress(TimeoutError):
                seat, _ = listener.accept()
                with seat.makefile("rb") as lines:
                    line = lines.readline()
        variables, files = json.loads(line)
        for name, text in files.items():
            (self._folder / name).write_text(text, encoding="utf-8")
            variables[name] = str(self._folder / name)
        for name in FILES:
            os.environ.pop(name, None)
        os.environ.update(variables)
        return seat

    def watch(self) -> None:
        """InputError peer_unreachable where a seat has ended. It names the machine and what was said there."""
        text = self._text()
        if found := _ENDED.search(text):
            raise unreachable(self.hosts[int(found[1])], self._told(f"it ended with code {found[2]}"))
        if self._process.poll() is not None:
            raise InputError("peer_unreachable", f"mlx.launch must start the ranks, and has ended: {self._told()}")

    def settled(self) -> None:
        """Every rank is there. See `handover.close_input`."""
        assert self._process.stdin
        with suppress(OSError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def _text(self) -> str:
        size = self._said.seek(0, os.SEEK_END)
        return _COLOURS.sub("", os.pread(self._said.fileno(), size, 0).decode(errors="replace"))

    def _told(self, otherwise: str = "nothing was said of why") -> str:
        """The last line that a rank or ssh has written, without mlx.launch's own."""
        lines = [line.strip() for line in self._text().splitlines() if line.strip() and not line.startswith("[")]
        return lines[-1] if lines else otherwise

    def close(self) -> None:
        """End the seats; the others end by rank 0's last order. What is still there after seconds is killed."""
        with self._stack:
            if not hasattr(self, "_process"):
                return
            if hasattr(self, "_seat"):
                with suppress(OSError), self._seat:
                    self._seat.sendall(END)
            else:
                self._kill(signal.SIGTERM)
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    self._process.wait(5)
                    break
                except subprocess.TimeoutExpired:
                    self._kill(number)
            self._kill(signal.SIGKILL)  # a rank that is stopped, for which mlx.launch did not wait
            assert self._process.stdin
            with suppress(OSError):
                self._process.stdin.close()

    def _kill(self, number: int) -> None:
        """mlx.launch, what it runs here, and its connections, which end what runs elsewhere."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _launcher() -> Sequence[str]:
    beside = Path(sys.executable).with_name("mlx.launch")
    found = str(beside) if beside.exists() else shutil.which("mlx.launch")
    if not found:
        raise InputError("package_missing", f"mlx.launch, which comes with mlx, must be beside {sys.executable}")
    return [found]


def free_ports(address: str, count: int) -> int:
    """The first of so many ports in a row that are free at an address of this machine. InputError where none are.

    None of those that systems give to connections (from 32768 on): while a rank tries to reach a port where none
    listens yet, its own end would get that port in the end, and be connected with itself.
    """
    fault = ""
    for first in random.sample(_PORTS, 50):
        try:
            with ExitStack() as stack:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server((address, port)))
            return first
        except OSError as error:
            fault = error.strerror or str(error)
    raise InputError("address_unusable", f"this machine must be able to listen on {address}: {fault}")
