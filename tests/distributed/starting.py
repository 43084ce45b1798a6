"""Commands of several ranks as a user starts them, in processes of their own, and a stand-in for ssh."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 100  # that a command may take on a loaded machine

REACHES = """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    del words[: 2 if words[0] == "-o" else 1]
host, *command = words
with open({log!r}, "a") as log:
    print(host, file=log)
os.environ["SSH_CONNECTION"] = "127.0.0.1 50000 127.0.0.1 22"
os.execvp("bash", ["bash", "-c", " ".join(command)])
"""
REFUSES = """#!/bin/sh
echo "ssh: connect to host mini.local port 22: Connection refused" >&2
exit 255
"""


def environment(**more: str) -> dict[str, str]:
    """Ours, in which processes import this package, and mlx.launch is found."""
    own = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return os.environ | own | more


def with_ssh(folder: Path, text: str) -> dict[str, str]:
    """An environment whose ssh is this text. What it is asked for is noted in folder/hosts."""
    ssh = folder / "ssh"
    ssh.write_text(text.replace("{python}", sys.executable).replace("{log!r}", repr(str(folder / "hosts"))))
    ssh.chmod(0o755)
    own = environment()
    return own | {"PATH": f"{folder}:{own['PATH']}"}


def run(*words: object, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command `generate` with --model nano, temperature 0 and these words."""
    return start("generate", "--model", "nano", "--temp", 0, *words, stdin=stdin, env=env)


def start(
    name: str, *words: object, launched: bool = False, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command of the package. launched: by mlx.launch, as two ranks."""
    command = [sys.executable, "-m", f"mlx_qwen35.{name}", *map(str, words)]
    if launched:
        command = ["mlx.launch", "-n", "2", "--backend", "ring", "--", *command]
    return subprocess.run(
        command, env=env or environment(), input=stdin, capture_output=True, text=True, timeout=SECONDS, check=False,
        start_new_session=True, cwd=ROOT,
    )  # fmt: skip


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON on standard output, which holds nothing else."""
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def processes(marker: str) -> list[str]:
    """The command lines of this machine that have this text in them."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if marker in line]
