"""A real terminal for tests: a command in a pane of tmux, keys that are sent, and its screen as text.

A test that needs it begins with `needs_tmux`, which names what is missing where there is no tmux.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")

KEPT = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "OPENBLAS_NUM_THREADS", "DYLD_LIBRARY_PATH")  # of our environment


class Terminal:
    """A command in a pane of its own tmux server, as a context; its environment is small, its home is `home`.

    Once the command has ended the pane stays, so that its last screen can be read.
    """

    def __init__(
        self,
        command: Sequence[object],
        home: Path,
        size: tuple[int, int] = (80, 24),
        environment: Mapping[str, str] | None = None,
    ):
        """size: columns and rows."""
        self._home, self._size = home, size
        self._command = [str(word) for word in command]
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        ours = {"HOME": str(home), "LANG": "C.UTF-8", "TERM": "xterm-256color"}
        self._environment = kept | ours | dict(environment or {})

    def __enter__(self) -> Self:
        columns, rows = self._size
        variables = [f"{name}={value}" for name, value in self._environment.items()]
        self._home.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory()  # short: a socket's path must be
        command = shlex.join(["exec", "env", "-i", *variables, *self._command])
        inner = shlex.quote(f"echo $$ > {self._file('process')}; {command}")  # tmux itself may miss an end
        configuration = self._file("conf")
        configuration.write_text(
            "set -g default-terminal xterm-256color\nset -g status off\nset -g escape-time 50\n"
            "set -g history-limit 5000\nset -g remain-on-exit on\nset -g remain-on-exit-format ''\n"
        )
        self._tmux(
            "-f", str(configuration), "new-session", "-d", "-x", str(columns), "-y", str(rows), "-c", str(self._home),
            f"sh -c {inner}; echo $? > {self._file('status')}",
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server")
        self._folder.cleanup()

    def keys(self, *keys: str) -> None:
        """Press keys, by tmux's names: Enter, C-c, M-Enter, Up, Tab."""
        self._tmux("send-keys", *keys)

    def type(self, text: str, enter: bool = True) -> None:
        """Type a text, with Enter behind it."""
        self._tmux("send-keys", "-l", text)
        if enter:
            self.keys("Enter")

    def paste(self, text: str) -> None:
        """Paste a text as terminals do, in brackets where the program has asked for them."""
        self._tmux("load-buffer", "-", text=text)
        self._tmux("paste-buffer", "-p", "-r")

    def resize(self, columns: int, rows: int) -> None:
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def screen(self, colours: bool = False, history: bool = False) -> str:
        """What is shown now. colours: with the sequences that make them. history: with what scrolled away."""
        options = ["-e"] * colours + ["-S", "-"] * history
        return self._tmux("capture-pane", "-p", *options).rstrip("\n") + "\n"

    def joined(self) -> str:
        """All that was shown, with the lines that the terminal itself broke made whole, as a copy has them."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-")

    def wait(self, *texts: str, count: int = 1, gone: bool = False, seconds: float = 60) -> str:
        """The screen with what scrolled away, as soon as it holds each of these texts `count` times, or none if `gone`.

        AssertionError with the screen once so many seconds have passed.
        """
        end = time.monotonic() + seconds
        while True:
            screen = self.screen(history=True)
            if all((text not in screen) if gone else screen.count(text) >= count for text in texts):
                return screen
            if time.monotonic() > end:
                raise AssertionError(f"after {seconds} s without {texts}:\n{screen}")
            time.sleep(0.03)

    @property
    def process(self) -> int:
        """The command's process."""
        return int(self._file("process").read_text())

    def ended(self, seconds: float = 60) -> int:
        """The exit status of the command, which must end soon."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._file("status").exists() and (status := self._file("status").read_text()):
                return int(status)
            time.sleep(0.03)
        raise AssertionError(f"still running after {seconds} s:\n{self.screen(history=True)}")

    def _file(self, name: str) -> Path:
        return Path(self._folder.name, name)

    def _tmux(self, *arguments: str, text: str = "") -> str:
        command = ["tmux", "-u", "-S", str(self._file("socket")), *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        return done.stdout


def ours(module: str, *arguments: object) -> list[object]:
    """A command of the package in this interpreter."""
    return [sys.executable, "-m", module, *arguments]
