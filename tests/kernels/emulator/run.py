"""Run a compiled launch on numpy arrays: lays out the memory, calls the runtime, reads its counts and faults."""

import ctypes
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
from kernels.capture import Buffer, Launch, Parameter

Order = Literal["forward", "backward"]
PAGE = 4096
RED_ZONE = 32 * PAGE
THREADGROUP_ARENA = 1 << 20
FAULTS = 64
INPUT, CONSTANT, OUTPUT, FILLED_OUTPUT = range(4)

Triple = ctypes.c_uint * 3


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        *((name, ctypes.c_uint64) for name in ("read", "written", "unique_read", "unique_written")),
    ]


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char_p),
        ("what", ctypes.c_char_p),
        ("position", ctypes.c_long),
        ("times", ctypes.c_uint64),
        ("threadgroup", Triple),
        ("thread", Triple),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", Triple),
        ("group", Triple),
        ("backward", ctypes.c_int),
        ("police", ctypes.c_int),
        *((name, ctypes.c_uint) for name in ("buffer_count", "argument_count", "fault_count", "threadgroup_next")),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("pointers", ctypes.POINTER(ctypes.c_void_p)),
        ("arena", ctypes.c_void_p),
        ("arena_size", ctypes.c_uint64),
        ("threadgroup_arena", ctypes.c_void_p),
        ("faults", ctypes.POINTER(_Fault)),
        *((name, ctypes.c_uint64) for name in ("barriers", "collectives", "tg_bytes", "tg_read", "tg_written")),
    ]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one array: requested, summed over all threads, and unique. Zero without police."""

    read: int
    written: int
    unique_read: int
    unique_written: int


@dataclass(frozen=True)
class Fault:
    """One kind of fault at one array, as first met. `position` is a byte of the array, or what `what` counts."""

    kind: str
    what: str
    position: int
    times: int
    threadgroup: tuple[int, ...] | None
    thread: tuple[int, ...] | None

    def __str__(self) -> str:
        where = f", first by thread {self.thread} of threadgroup {self.threadgroup}" if self.thread else ""
        return f"{self.kind}: {self.what} {self.position}{where} ({self.times} times)"


@dataclass(frozen=True)
class LaunchReport:
    """Counts of one launch: barriers of all threadgroups, collectives of all simdgroups; bytes as in Traffic."""

    name: str
    threadgroups: int
    barriers: int
    collectives: int
    threadgroup_memory: int
    threadgroup_read: int
    threadgroup_written: int
    buffers: dict[str, Traffic]  # of the arrays in device memory
    constants: dict[str, Traffic]  # of the small ones, in constant memory, with shapes and strides
    faults: list[Fault] = field(default_factory=list)

    def device(self, *without: str) -> Traffic:
        """The sum over the arrays in device memory."""
        chosen = [traffic for name, traffic in self.buffers.items() if name not in without]
        return Traffic(*(sum(getattr(t, name) for t in chosen) for name in Traffic.__dataclass_fields__))


def run(
    library: Path,
    launch: Launch,
    inputs: list[np.ndarray],
    order: Order = "forward",
    police: bool = False,
    fill: float | None = None,
) -> tuple[list[np.ndarray], LaunchReport]:
    """Run a launch. `inputs` and the outputs are flat arrays of bytes. `fill`: init_value of the call."""
    contents = _contents(launch, inputs)
    for buffer in launch.outputs:
        empty = np.full(buffer.nbytes, 0xFF, np.uint8)
        contents[buffer.name] = (OUTPUT, empty) if fill is None else (FILLED_OUTPUT, _filled(buffer, fill))
    names = list(contents)
    sizes = [contents[name][1].nbytes for name in names]
    starts, total = _layout([*sizes, THREADGROUP_ARENA])
    arena = np.full(total + PAGE, 0xFF, np.uint8)
    base = -(-arena.ctypes.data // PAGE) * PAGE
    memory = arena[base - arena.ctypes.data :]
    buffers = (_Buffer * len(names))()
    for name, start, size, buffer in zip(names, starts, sizes, buffers, strict=False):
        kind, data = contents[name]
        memory[start : start + size] = data
        buffer.data, buffer.size, buffer.name, buffer.kind = base + start, size, name.encode(), kind
    order_of_arguments = [p.name for p in launch.parameters]
    pointers = (ctypes.c_void_p * len(order_of_arguments))()
    for i, name in enumerate(order_of_arguments):
        if name in contents:
            pointers[i] = base + starts[names.index(name)]
    faults = (_Fault * FAULTS)()
    call = _Launch(
        Triple(*launch.grid), Triple(*launch.threadgroup), order == "backward", police, len(names), len(pointers), 0, 0,
        buffers, pointers, base, total, base + starts[-1], faults,
    )  # fmt: skip
    _runtime(library).emu_run(ctypes.byref(call))
    report = _report(launch, call, buffers, faults)
    at = dict(zip(names, zip(starts, sizes, strict=False), strict=False))
    return [memory[at[b.name][0] : sum(at[b.name])].copy() for b in launch.outputs], report


@cache
def _runtime(library: Path) -> ctypes.PyDLL:
    return ctypes.PyDLL(str(library))  # one run at a time: it holds the interpreter's lock


def _contents(launch: Launch, inputs: list[np.ndarray]) -> dict[str, tuple[int, np.ndarray]]:
    """Kind and bytes of each array that the kernel reads, by parameter name."""
    shapes = {buffer.name: buffer.shape for buffer in launch.inputs}
    found = {}
    for buffer, data in zip(launch.inputs, inputs, strict=True):
        kind = INPUT if buffer.space == "device" else CONSTANT
        found[buffer.name] = (kind, np.ascontiguousarray(data).reshape(-1).view(np.uint8))
    for parameter in launch.parameters:
        if parameter.kind in ("shape", "strides", "ndim"):
            found[parameter.name] = (CONSTANT, _fact(parameter, shapes[parameter.buffer]).view(np.uint8))
    return found


def _fact(parameter: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    if parameter.kind == "ndim":
        return np.array([len(shape)], np.int32)
    if parameter.kind == "shape":
        return np.array(shape, np.int32)
    return np.array([math.prod(shape[i + 1 :]) for i in range(len(shape))], np.int64)


def _filled(buffer: Buffer, fill: float) -> np.ndarray:
    full = mx.full((math.prod(buffer.shape),), fill, buffer.dtype)
    return np.array(full.view(mx.uint8))


def _layout(sizes: list[int]) -> tuple[list[int], int]:
    """Where each array starts, on pages of its own behind a red zone, and the size of it all."""
    starts, at = [], RED_ZONE
    for size in sizes:
        starts.append(at)
        at = -(-(at + size) // PAGE) * PAGE + RED_ZONE
    return starts, at


def _report(launch: Launch, call: _Launch, buffers, faults) -> LaunchReport:
    traffic = {b.name.decode(): Traffic(b.read, b.written, b.unique_read, b.unique_written) for b in buffers}
    constant = {b.name.decode() for b in buffers if b.kind == CONSTANT}
    return LaunchReport(
        name=launch.name,
        threadgroups=math.prod(-(-g // t) for g, t in zip(launch.grid, launch.threadgroup, strict=True)),
        barriers=call.barriers,
        collectives=call.collectives,
        threadgroup_memory=call.tg_bytes,
        threadgroup_read=call.tg_read,
        threadgroup_written=call.tg_written,
        buffers={name: value for name, value in traffic.items() if name not in constant},
        constants={name: value for name, value in traffic.items() if name in constant},
        faults=[_fault(faults[i]) for i in range(call.fault_count)],
    )


def _fault(fault: _Fault) -> Fault:
    known = fault.thread[0] != 0xFFFFFFFF
    place = (tuple(fault.threadgroup), tuple(fault.thread)) if known else (None, None)
    return Fault(fault.kind.decode(), fault.what.decode(), fault.position, fault.times, *place)
