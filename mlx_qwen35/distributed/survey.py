"""What each of several machines is and has, and how fast they are together, before a model is loaded.

Rank 0 asks (`survey`), and every other rank obeys. Where ranks compute together all run the same duty.
"""

import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.backend import backend, device_name, system_memory
from mlx_qwen35.budget.split_speed import Link
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.dtypes import DTYPES
from mlx_qwen35.checkpoint.fingerprint import fingerprint
from mlx_qwen35.checkpoint.hub import is_local, published, resolve
from mlx_qwen35.distributed.channel import Leader, Order
from mlx_qwen35.distributed.group import Group
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.attention import attention_impl
from mlx_qwen35.machine.chip import this_chip
from mlx_qwen35.machine.memory import usable_bytes
from mlx_qwen35.machine.pressure import NORMAL, pressure
from mlx_qwen35.machine.versions import versions
from mlx_qwen35.model.layers import Linear
from mlx_qwen35.quantization import Quantization

ECHOES = 100  # orders whose round trip is measured
SUMS = 100
SENDS, SENT = 3, 8 << 20  # arrays that go each way, and bytes of each
READS, READ = 5, 16 << 20  # products that are timed, of which the fastest counts, and bytes of their matrix
RDMA = "/usr/bin/rdma_ctl"
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked of every machine: a model to look for, and the forms that it would be computed in.

    model: where a machine may have it, folders or an id; empty: none is asked for. width: of a hidden state.
    quantization: of its matrices (group_size, bits, mode), or None.
    """

    model: tuple[str, ...]
    revision: str | None
    dtype: str
    head_dim: int
    width: int
    quantization: tuple[int, int, str] | None


@dataclass(frozen=True)
class Facts:
    """Of one machine.

    chip: its name. apple: whether that is an Apple chip whose figures are known. memory, limit, available: bytes that
    it has, that a model may take, and that are free now (None: not told). short: whether the system says that memory is
    short. device: what MLX computes on, by the backend's name. backends: name -> why it cannot be used, "" where it
    can. fingerprint: of the model; None where it is not on its disk, for the reason `fault`. rate: bytes of weights a
    second, measured; None on an Apple chip.
    """

    chip: str
    apple: bool
    memory: int
    limit: int
    available: int | None
    short: bool
    system: str
    device: str
    versions: Mapping[str, str]
    backends: Mapping[str, str]
    attention_impl: str
    fingerprint: str | None
    fault: str
    rate: float | None = None


@dataclass(frozen=True)
class Times:
    """Of many, in seconds: the median, the best, and the one that 95 of 100 do not exceed."""

    median: float
    best: float
    late: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        found = sorted(seconds)
        return cls(found[len(found) // 2], found[0], found[min(len(found) - 1, len(found) * 95 // 100)])


@dataclass(frozen=True)
class Surveyed:
    """facts: of every rank. round_trip: of an order and the answers of all. all_sum: of a row of hidden states.
    bandwidth: bytes a second from each rank to the next, the last one's to rank 0.
    """

    facts: Sequence[Facts]
    round_trip: Times
    all_sum: Times
    bandwidth: Sequence[float]

    @property
    def link(self) -> Link:
        """As it is at the median."""
        return Link(self.round_trip.median, self.all_sum.median, min(self.bandwidth))

    @property
    def late_link(self) -> Link:
        """As it is at the 95th percentile."""
        return Link(self.round_trip.late, self.all_sum.late, min(self.bandwidth))


# --- every rank ------------------------------------------------------------------------------------------------------


def look(question: Question) -> Facts:
    """The facts of this machine, but for its rate."""
    chip = this_chip()
    found, fault = stored(question.model, question.revision)
    return Facts(
        chip=chip.name if chip else device_name(mx.default_device().type), apple=bool(chip and backend().watchdog),
        memory=system_memory(), limit=usable_bytes(None), available=_available(),
        short=(pressure() or NORMAL) > NORMAL, system=platform.platform(terse=True),
        device=backend().name, versions=versions() | {"Python": platform.python_version()}, backends=backends(),
        attention_impl=attention_impl(question.head_dim, DTYPES[question.dtype]), fingerprint=found, fault=fault,
    )  # fmt: skip


def stored(places: Sequence[str], revision: str | None) -> tuple[str | None, str]:
    """The fingerprint of a checkpoint on this machine's disk, or None and why there is none. Nothing is downloaded.

    places: names, of which the first that is there counts.
    """
    fault = ""
    for name in places:
        try:
            found = resolve(name) if is_local(name) else published(name, revision)
            if isinstance(found, Path):
                return fingerprint(open_checkpoint(found)), ""
            fault = fault or f"{name} is not in the hub's cache there"
        except InputError as error:
            fault = fault or error.fault
    return None, fault


def backends() -> dict[str, str]:
    """Name -> why ranks cannot be joined by it, "" where they can."""
    found = {name: "" if mx.distributed.is_available(name) else "this MLX has none" for name in ("ring", "jaccl")}
    if platform.system() == "Darwin" and not found["jaccl"]:
        state = _rdma()
        found["jaccl"] = "" if state == "enabled" else f"rdma_ctl says {state}"
    return found


def _rdma() -> str:
    """What macOS says of RDMA over Thunderbolt."""
    try:
        asked = subprocess.run([RDMA, "status"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nothing ({error})"
    return " ".join(asked.stdout.split()) or "nothing"


def _available() -> int | None:
    """Bytes that programs can take before the system swaps, where it tells (Linux)."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def read_rate(question: Question) -> float:
    """Bytes of weights a second that this machine reads for one row, by the product that a model would run."""
    columns, dtype = question.width, DTYPES[question.dtype]
    how = Quantization(*question.quantization) if question.quantization else None
    rows = 8 * READ // (columns * (how.bits if how else 8 * dtype.size))
    if how is None:
        parts = {"weight": mx.zeros((rows, columns), dtype)}
    else:
        scales = mx.uint8 if how.mode != "affine" else dtype
        parts = {
            name: mx.zeros(shape, mx.uint32 if name == "weight" else scales)
            for name, shape in how.parts((rows, columns)).items()
        }
    linear, row = Linear(parts, how), mx.ones((1, columns), dtype)
    seconds = _timed(READS, lambda: mx.eval(linear(row)))
    return sum(part.nbytes for part in parts.values()) / min(seconds)


def _timed(count: int, run: Callable[[], object]) -> list[float]:
    """Seconds of each of so many runs, after one that is not counted."""
    run()
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _sum(group: Group, fields: Fields) -> dict[str, Any]:
    row = mx.zeros((1, 1, fields["width"]), DTYPES[fields["dtype"]])
    return {"seconds": _timed(fields["count"], lambda: mx.eval(group.all_sum(row)))}


def _send(group: Group, fields: Fields) -> dict[str, Any]:
    """Send an array from one rank to its neighbour, which says how long it took to come."""
    source, to, shape = fields["source"], fields["to"], (fields["nbytes"] // 4,)
    if group.rank == source:
        array = mx.zeros(shape)
        mx.eval(array)
        return {"seconds": _timed(fields["count"], lambda: mx.eval(group.send(array, to)))}
    if group.rank == to:
        return {"seconds": _timed(fields["count"], lambda: mx.eval(group.receive(shape, mx.float32, source)))}
    return {}


def _look(group: Group, fields: Fields) -> dict[str, Any]:
    return asdict(look(_question(fields)))


def _rate(group: Group, fields: Fields) -> dict[str, Any]:
    return {"rate": read_rate(_question(fields["question"])) if group.rank == fields["rank"] else None}


def _question(fields: Fields) -> Question:
    how = fields["quantization"]
    return Question(**{**fields, "model": tuple(fields["model"]), "quantization": tuple(how) if how else None})


_DUTIES: Mapping[str, Callable[[Group, Fields], dict[str, Any]]] = {
    "survey.look": _look, "survey.echo": lambda group, fields: {}, "survey.sum": _sum, "survey.send": _send,
    "survey.rate": _rate,
}  # fmt: skip


def is_of_survey(order: Order) -> bool:
    """Whether `obey` can do what an order says."""
    return order.name in _DUTIES


def obey(group: Group, order: Order) -> dict[str, Any]:
    """Do on another rank what a survey asks. Return the answer."""
    return _DUTIES[order.name](group, order.fields)


# --- rank 0 ----------------------------------------------------------------------------------------------------------


def survey(group: Group, leader: Leader, question: Question) -> Surveyed:
    """Ask every rank and measure, in some seconds."""

    def ask(name: str, **fields: Any) -> list[dict[str, Any]]:
        """What every rank answers, this one first."""
        leader.give(Order(name, fields))
        own = _DUTIES[name](group, fields)
        return [own, *map(dict, leader.answers())]

    facts = [Facts(**told) for told in ask("survey.look", **asdict(question))]
    round_trip = Times.of(_timed(ECHOES, lambda: ask("survey.echo")))
    all_sum = Times.of(ask("survey.sum", count=SUMS, width=question.width, dtype=question.dtype)[0]["seconds"])
    bandwidth = []
    for source in range(group.size):
        to = (source + 1) % group.size
        told = ask("survey.send", source=source, to=to, nbytes=SENT, count=SENDS)[to]
        bandwidth.append(SENT / Times.of(told["seconds"]).median)
    rates = [None if own.apple else _rate_of(ask, rank, question) for rank, own in enumerate(facts)]
    known = [Facts(**{**asdict(own), "rate": rate}) for own, rate in zip(facts, rates, strict=True)]
    return Surveyed(known, round_trip, all_sum, bandwidth)


def _rate_of(ask: Callable[..., list[dict[str, Any]]], rank: int, question: Question) -> float:
    """One machine after the other: they may be one."""
    rate = ask("survey.rate", rank=rank, question=asdict(question))[rank]["rate"]
    assert isinstance(rate, float)
    return rate
