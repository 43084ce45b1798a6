"""The Metal source that MLX would compile, on any machine: mx.export_function traces a function without running it.

For every launch of a custom kernel the callback receives the generated function (signature, body, template
instantiation), the grid, the threadgroup and the arrays. `init_value` and `verbose` are not among what it tells.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

Space = Literal["device", "constant", "reference"]


@dataclass(frozen=True)
class Buffer:
    """One array of a launch. `space` is how the kernel sees it: constant under 8 elements, reference without axes."""

    name: str
    space: Space
    shape: tuple[int, ...]
    dtype: mx.Dtype
    key: str  # the name that the trace gives the array

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Parameter:
    """One parameter of the kernel function, in order: an array, a fact about an array, or a thread attribute."""

    name: str
    kind: Literal["buffer", "shape", "strides", "ndim", "attribute"]
    type: str  # as written: "const device float*", "uint3"
    buffer: str = ""  # of which array


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch; `source` is the exact text for the Metal compiler, behind MLX's own headers."""

    name: str
    function: str  # the name with the instantiated template arguments, as C++ writes it
    template: tuple[str, ...]
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    parameters: tuple[Parameter, ...]
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    row_contiguous: bool


@dataclass(frozen=True)
class Recording:
    """The launches of a function, and the arrays that it brought along itself (numbers given as inputs), by key."""

    launches: list[Launch]
    constants: dict[str, mx.array]
    arguments: list[str]  # the keys of the function's own arguments, in order


def record(function: Callable[..., Any], *arrays: mx.array) -> Recording:
    """The kernel launches of function(*arrays), in order. Nothing is evaluated; works on the CPU."""
    events: list[dict[str, Any]] = []
    mx.export_function(events.append, function, *arrays)
    recording = Recording([], {}, [])
    for event in events:
        if event["type"] == "inputs":
            recording.arguments.extend(key for key, *_ in event["inputs"])
        elif event["type"] == "constants":
            recording.constants.update(event["constants"])
        elif event.get("name") == "CustomKernel":
            recording.launches.append(_launch(event))
    return recording


def capture(function: Callable[..., Any], *arrays: mx.array) -> list[Launch]:
    """The kernel launches of function(*arrays), in order."""
    return record(function, *arrays).launches


def _launch(event: dict[str, Any]) -> Launch:
    name, source, *sizes = event["arguments"][:8]
    arrays = [(key, tuple(shape), dtype) for key, shape, dtype in [*event["inputs"], *event["outputs"]]]
    parameters = _parameters(name, source)
    spaces = {p.name: _space(p.type) for p in parameters if p.kind == "buffer"}
    buffers = [
        Buffer(parameter, space, shape, dtype, key)
        for (parameter, space), (key, shape, dtype) in zip(spaces.items(), arrays, strict=True)
    ]
    inputs = len(event["inputs"])
    instance = re.search(r"decltype\((.*)\)", source)
    function = instance[1] if instance else name
    return Launch(
        name=name,
        function=function,
        template=tuple(_template(function)),
        source=source,
        grid=tuple(sizes[:3]),
        threadgroup=tuple(sizes[3:]),
        parameters=parameters,
        inputs=tuple(buffers[:inputs]),
        outputs=tuple(buffers[inputs:]),
        row_contiguous=event["arguments"][9],
    )


def _template(function: str) -> list[str]:
    _, _, arguments = function.partition("<")
    return [argument.strip() for argument in arguments.removesuffix(">").split(",")] if arguments else []


def _space(written: str) -> Space:
    if "device" in written:
        return "device"
    return "reference" if written.endswith("&") else "constant"


def _parameters(name: str, source: str) -> tuple[Parameter, ...]:
    start = source.index(f"void {name}(") + len(f"void {name}(")
    text = source[start : source.index(") {", start)]
    found: list[Parameter] = []
    last = ""
    for line in text.split(",\n"):
        written, parameter, attribute = re.fullmatch(r"\s*(.+?)\s*(\w+) \[\[(\w+).*\]\]\s*", line, re.S).groups()
        fact = parameter.removeprefix(f"{last}_")
        if attribute != "buffer":
            found.append(Parameter(parameter, "attribute", written))
        elif last and parameter != last and fact in ("shape", "strides", "ndim"):
            found.append(Parameter(parameter, fact, written, last))
        else:
            last = parameter
            found.append(Parameter(parameter, "buffer", written, last))
    return tuple(found)
