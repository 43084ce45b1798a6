"""Run Metal kernels without a Mac: `emulate` evaluates a function with its custom kernels executed on the CPU.

Everything but the kernels is MLX's own. A kernel's text is what MLX would compile (kernels/capture.py); clang checks it
with real address spaces and compiles it against a shim of Metal's library (metal*.h); the runtime executes it with one
fibre per thread, the lanes of a simdgroup in lockstep. Limits: no textures, atomics or simdgroup matrices; libm for
Metal's exp, log and rsqrt; denormal numbers stay; the order inside simd_sum is that of a butterfly; a wild pointer ends
the process, unless under police; what a kernel reads before and after a collective counts twice (the compiler cannot
know that a collective leaves memory alone), and bytes are counted behind clang's optimiser, not Apple's.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from kernels.capture import record
from kernels.emulator.build import CompileError, library, missing
from kernels.emulator.run import Fault, LaunchReport, Order, Traffic, run

__all__ = ["CompileError", "Fault", "KernelFault", "Report", "Traffic", "emulate", "emulated", "missing"]


class KernelFault(Exception):
    """A launch without police in which threads missed a barrier or collective, or that broke a limit."""


@dataclass
class Report:
    """What the launches did, in order."""

    launches: list[LaunchReport] = field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        return [fault for launch in self.launches for fault in launch.faults]


def emulate(
    function: Callable[..., Any], *arrays: Any, order: Order = "forward", police: bool = False
) -> tuple[Any, Report]:
    """function(*arrays), evaluated, with every kernel launch emulated, and the report on the launches.

    `order`: in which order lanes, simdgroups and threadgroups run; a sound kernel gives the same bits in both.
    `police`: watch and count every access to memory; 3 to 10 times slower. Faults are then in the report; without it
    those that the runtime sees by itself raise KernelFault.
    """
    with emulated(order, police) as report:
        outputs = function(*arrays)
        mx.eval(outputs)
    return outputs, report


@contextlib.contextmanager
def emulated(order: Order = "forward", police: bool = False) -> Iterator[Report]:
    """Within, mx.fast.metal_kernel makes emulated kernels; mx.compile and the package's own kernels are set aside."""
    report = Report()
    real = mx.fast.metal_kernel

    def metal_kernel(*names: Any, **definition: Any) -> Callable[..., list[mx.array]]:
        return functools.partial(_call, real(*names, **definition), report, order, police)

    mx.disable_compile()
    forget_kernels()
    try:
        with mock.patch.object(mx.fast, "metal_kernel", metal_kernel):
            yield report
    finally:
        forget_kernels()
        mx.enable_compile()


def forget_kernels() -> None:
    """Have every kernel built anew. Without the package there is none."""
    with contextlib.suppress(ImportError):
        from mlx_qwen35.kernels import fused

        for value in vars(fused).values():
            getattr(value, "cache_clear", lambda: None)()


def _call(
    kernel: Callable[..., list[mx.array]],
    report: Report,
    order: Order,
    police: bool,
    *,
    inputs: list[Any],
    init_value: float | None = None,
    stream: Any = None,
    verbose: bool = False,
    **call: Any,
) -> list[mx.array]:
    """What a kernel object is called with -> its outputs."""
    given = [value for value in inputs if isinstance(value, mx.array)]
    mx.eval(given)

    def trace(*arrays: mx.array) -> list[mx.array]:
        rest = iter(arrays)
        return kernel(inputs=[next(rest) if isinstance(x, mx.array) else x for x in inputs], verbose=verbose, **call)

    recording = record(trace, *(mx.zeros(x.shape, x.dtype) for x in given))
    (launch,) = recording.launches
    values = recording.constants | dict(zip(recording.arguments, given, strict=True))
    contents = [bytes_of(values[buffer.key]) for buffer in launch.inputs]
    outputs, launch_report = run(library(launch, police), launch, contents, order, police, init_value)
    report.launches.append(launch_report)
    if launch_report.faults and not police:
        raise KernelFault("\n".join(map(str, launch_report.faults)))
    return [array_of(data, b.shape, b.dtype) for data, b in zip(outputs, launch.outputs, strict=True)]


def bytes_of(array: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))


def array_of(data: np.ndarray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(data).view(dtype).reshape(shape)
