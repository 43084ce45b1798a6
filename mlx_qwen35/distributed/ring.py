"""The ranks over mx.distributed: over TCP (`ring`), or over Thunderbolt 5 (`jaccl`).

Both compute on MLX's CPU stream, wherever their arrays come from; MLX waits for a GPU by itself. Sums of 16-bit types
work, and have the same bits on every rank over the ring.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_qwen35.errors import InputError

BACKENDS = ("ring", "jaccl")
_TELLS = tuple(f"[{name}]" for name in BACKENDS)  # how their errors begin


class RingGroup:
    """A Group over a group of mx.distributed."""

    def __init__(self, group: mx.distributed.Group):
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def all_sum(self, array: mx.array) -> mx.array:
        """The sum of every rank's array, the same bits on every rank; lazy, of the same dtype."""
        return mx.distributed.all_sum(array, group=self._group)

    def all_gather(self, array: mx.array) -> mx.array:
        """(n, ...) of each rank -> (size, n, ...) of all, in the order of ranks; lazy."""
        return mx.distributed.all_gather(array[None], group=self._group)

    def send(self, array: mx.array, to: int) -> mx.array:
        """Send an array to a neighbour in the ring. What it returns must be evaluated."""
        return mx.distributed.send(array, to, group=self._group)

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        """The array that a neighbour sends; lazy."""
        return mx.distributed.recv(shape, dtype, source, group=self._group)


def is_collective(error: BaseException | None) -> bool:
    """Whether a collective of MLX raised this, or what this came of."""
    while error is not None:
        if isinstance(error, RuntimeError) and str(error).startswith(_TELLS):
            return True
        error = error.__cause__ or error.__context__
    return False


def open_group(backend: str) -> RingGroup:
    """The ranks that mlx.launch has started with this one. backend: one of BACKENDS.

    It waits for the other ranks for ever, in MLX, where no signal or thread of Python runs (`ended_after` ends that):
    Ctrl-C ends the process at once meanwhile. From here on MLX's own lines about lost connections are kept from
    standard error.

    InputError ring_failed, with what MLX says and what to do.
    """
    try:
        with _ended_by_interrupts():
            group = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError("ring_failed", f"MLX cannot join the ranks ({reason})", _remedy(reason, backend)) from error
    if group.size() < 2:
        raise InputError("ring_failed", "one model over several machines needs 2 ranks or more, got 1", _START)
    _silence_backends()
    return RingGroup(group)


_START = "Start them with --with HOST, or mlx.launch -n 2 --backend ring"


def _remedy(reason: str, backend: str) -> str:
    if "bind" in reason or "listen" in reason:
        return "Another process has the port, or the address is not this machine's: mlx.launch --starting-port N"
    if "connect" in reason:
        return "A rank has ended or cannot be reached: look at its own message, its address and its firewall"
    if "parse" in reason or "json" in reason:
        return "MLX_HOSTFILE names a JSON file: for each rank a list of addresses such as \"10.0.0.1:5000\""
    if "environment" in reason or "Rank" in reason:
        return _START
    return "RDMA needs Thunderbolt 5 and macOS 26.2: --backend ring works without" if backend == "jaccl" else _START


@contextmanager
def ended_after(seconds: float, line: str) -> Iterator[None]:
    """Where the block takes longer, the process ends with 1 and this line on standard error, whatever it waits for.

    The thread of faulthandler ends it, which needs no lock of Python's; a shell tells the line once that has spoken.
    """
    script = 'grep -q . && printf "%s\\n" "$1" >&2'
    with subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    ) as teller:
        assert teller.stdin
        faulthandler.dump_traceback_later(seconds, file=teller.stdin, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    """Ctrl-C ends the process at once, in silence, since code that holds Python's lock never looks for it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _silence_backends() -> None:
    """Keep from standard error the eleven lines that MLX writes there, past Python, for a peer that is lost.

    What is not Python's goes through a process, which passes on all other lines, and what MLX says as it aborts.
    """
    global _filter
    try:
        own = os.dup(sys.stderr.fileno())
        pattern = rf"^\[({'|'.join(BACKENDS)})\] "
        command = ["grep", "--line-buffered", "-Ev", pattern]
        _filter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=own, start_new_session=True)
    except (OSError, ValueError, AttributeError):  # no standard error, or no grep
        return
    assert _filter.stdin
    os.dup2(_filter.stdin.fileno(), 2)
    _filter.stdin.close()
    sys.stderr = open(own, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)  # noqa: SIM115


_filter: subprocess.Popen[bytes] | None = None  # of this process
