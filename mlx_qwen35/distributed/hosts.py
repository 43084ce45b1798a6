"""The other machines: how they are named, whether they can be reached, and by which addresses they reach each other."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

HERE = "127.0.0.1"  # another process of this machine
SECONDS = 20.0  # that a machine may take to answer
_NO_PYTHON, _NO_PACKAGE = 67, 68  # how the script below ends, in a range that neither ssh nor a shell uses


@dataclass(frozen=True)
class Host:
    """A machine. name: for ssh, or HERE. python: the interpreter there."""

    name: str
    python: str

    @property
    def is_here(self) -> bool:
        return self.name == HERE


@dataclass(frozen=True)
class Hostfile:
    """What mlx.launch is told: each machine's name, addresses and RDMA devices, as mlx.distributed_config writes them.

    backend: "ring", "jaccl" or "jaccl-ring". hosts: of every rank; the first is this machine.
    """

    backend: str
    hosts: Sequence[Host]
    addresses: Sequence[Sequence[str]]
    devices: Sequence[Sequence[Any]]
    environment: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        rows = zip(self.hosts, self.addresses, self.devices, strict=True)
        return {
            "backend": self.backend, "envs": list(self.environment),
            "hosts": [{"ssh": host.name, "ips": list(ips), "rdma": list(rdma)} for host, ips, rdma in rows],
        }  # fmt: skip


def check_hosts(name: str, value: Any) -> tuple[str, ...]:
    """The words of the option that names the other machines. InputError for what can be none."""
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise InputError("option_invalid", f"{name} must be names of machines, as mini.local; got {shown(value)}")
    found = tuple(word.strip() for word in words)
    hosts = [host_of(word) for word in found]
    for host, word in zip(hosts, found, strict=True):
        own = host.name
        if not own or own.startswith("-") or own.endswith("@") or not own.isprintable() or " " in own:
            raise InputError(
                "option_invalid", f"{name} must be names that ssh knows, as mini.local or me@mini.local; got {word!r}"
            )
    machines = [host.name.rpartition("@")[2] for host in hosts if not host.is_here]
    twice = next((own for own in machines if machines.count(own) > 1), None)
    if twice:
        raise InputError("option_invalid", f"{name} must name each machine once, got {twice} more than once")
    return found


def host_of(word: str) -> Host:
    """HOST, or HOST:/PATH/OF/PYTHON."""
    name, colon, python = word.partition(":/")
    return Host(HERE if name == "localhost" else name, f"/{python}" if colon else sys.executable)


def hostfile_of(words: Sequence[str]) -> Hostfile:
    """How these machines and this one are joined. One word that names a file of mlx.distributed_config is read.

    Raises InputError peer_unreachable, which names the machine, for one that cannot be reached or lacks what it needs.
    """
    if len(words) == 1 and words[0].endswith(".json"):
        return _read(Path(words[0]))
    others = [host_of(word) for word in words]
    ours, theirs = zip(*(_addresses(host) for host in others), strict=True)
    known = dict.fromkeys(own for own, host in zip(ours, others, strict=True) if not host.is_here)
    here = next(iter(known), HERE)  # by which the others reach this machine
    addresses = [here if host.is_here else own for own, host in zip(theirs, others, strict=True)]
    hosts = [Host(HERE, sys.executable), *others]
    return Hostfile("ring", hosts, [[own] for own in (here, *addresses)], [[]] * len(hosts))


def _read(file: Path) -> Hostfile:
    """A file of mlx.distributed_config. Its first machine is this one."""
    try:
        found = json.loads(file.expanduser().read_text(encoding="utf-8"))
        rows = found["hosts"] if isinstance(found, dict) else found
        names = [str(row["ssh"]) for row in rows]
        addresses = [[str(own) for own in row.get("ips", [])] for row in rows]
        devices = [list(row.get("rdma", [])) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            "option_invalid",
            f"{file} must be a file that mlx.distributed_config wrote, with ssh, ips and rdma of each machine: {error}",
        ) from error
    told = found if isinstance(found, dict) else {}
    backend = str(told.get("backend") or ("jaccl" if any(devices) else "ring"))
    if len(names) < 2 or backend not in ("ring", "jaccl", "jaccl-ring"):
        raise InputError(
            "option_invalid",
            f"{file} must name at least two machines, this one first, and the backend ring or jaccl; it names "
            f"{len(names)}, and {backend}",
        )
    others = [host_of(word) for word in check_hosts(str(file), names[1:])]
    for host in others:
        _addresses(host)
    return Hostfile(backend, [Host(HERE, sys.executable), *others], addresses, devices, tuple(told.get("envs", ())))


def _addresses(host: Host) -> tuple[str, str]:
    """The address by which a machine reaches this one, and its own. InputError where it cannot be reached."""
    if host.is_here:
        if not os.access(host.python, os.X_OK):
            raise _without_python(host)
        return HERE, HERE
    ours, _, theirs, _ = (_look(host).split() + [""] * 4)[:4]
    if theirs:
        return ours, theirs
    name = _ssh(host, ["-G"], "").partition("\nhostname ")[2].partition("\n")[0] or host.name.rpartition("@")[2]
    try:
        family, _, _, _, there = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing: it says which of this machine's addresses leads there
            return str(probe.getsockname()[0]), str(there[0])
    except OSError as error:
        raise unreachable(host, f"its address is not known: {error.strerror or error}") from error


def _look(host: Host) -> str:
    """What ssh on a machine says of its connection, once Python and the package are found there."""
    python = shlex.quote(host.python)
    there = shlex.quote("import importlib.util, sys; sys.exit(not importlib.util.find_spec('mlx_qwen35'))")
    script = (
        f'echo "$SSH_CONNECTION"; test -x {python} || exit {_NO_PYTHON}; {python} -c {there} || exit {_NO_PACKAGE}'
    )
    return _ssh(host, [], script)


def _ssh(host: Host, options: Sequence[str], script: str) -> str:
    """The output of a script on a machine. No password is asked for. The ring knows addresses of IPv4 alone."""
    quick = ["-4", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SECONDS / 2:.0f}"]
    command = ["ssh", *quick, *options, host.name, *([script] if script else [])]
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS,
            check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise unreachable(host, "there is no ssh on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise unreachable(host, f"it did not answer within {SECONDS:.0f} s") from error
    if ran.returncode == _NO_PYTHON:
        raise _without_python(host)
    if ran.returncode == _NO_PACKAGE:
        raise unreachable(host, f"its {host.python} has no mlx_qwen35. Install the same version there")
    if ran.returncode:
        said = (ran.stderr.strip() or ran.stdout.strip() or f"ssh ended with {ran.returncode}").splitlines()[-1]
        raise unreachable(
            host,
            f"{said.strip(' .')}; it must be reached without a password or a question; see whether this works: "
            f"ssh {host.name}",
        )
    return ran.stdout


def _without_python(host: Host) -> InputError:
    return unreachable(host, f"it has no Python at {host.python}. Say where it is: {host.name}:/PATH/OF/PYTHON")


def unreachable(host: Host, why: str) -> InputError:
    return InputError("peer_unreachable", f"{host.name} cannot take part: {why}")
