"""Record the graph that MLX would run on a Metal GPU, on any machine.

On the CPU MLX records RMSNorm, rotary embedding, attention, dequantization and compiled functions as the many
operations that they are made of there, and cannot record `contiguous`. While it records, each is a marker: a Metal
kernel that does nothing, one node of the graph with the inputs, the output shapes and the name of what it stands for.
A compiled function's marker says how many launches it is, as MLX's own compiler fuses it.

Imports nothing but MLX's core: mlx.nn, whose functions are compiled when it is imported, belongs inside of `prepared`.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

# What MLX's compiler leaves may hold these, which launch nothing.
VIEWS = ("Broadcast", "BroadcastAxes", "ExpandDims", "Squeeze", "Transpose", "Reshape", "Flatten", "Unflatten", "Slice",
         "Split", "Copy", "StopGradient", "Depends", "CustomTransforms")  # fmt: skip

# MLX first casts what these are given to the widest dtype among it.
CASTING = ("rms_norm", "layer_norm", "scaled_dot_product_attention")


class _State:
    """What a process has switched on, and MLX's own functions in the place of which it records markers.

    recording: markers stand in for what they replace. compiling: inside a compiled function, whatever it calls is part
    of it.
    """

    def __init__(self) -> None:
        self.recording = self.compiling = False
        self.real: dict[str, Callable] = {}


_state = _State()


def arrays(value: Any) -> Iterator[mx.array]:
    """The arrays in arguments, results or caches: containers and plain objects are searched, each once."""
    seen: set[int] = set()

    def search(value: Any) -> Iterator[mx.array]:
        if isinstance(value, mx.array):
            yield value
        elif id(value) not in seen and not isinstance(value, str | bytes | int | float | type):
            seen.add(id(value))
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            for item in (*inner, *getattr(value, "__dict__", {}).values()):
                yield from search(item)

    yield from search(value)


def mark(label: str, inputs: list[mx.array], like: list[mx.array]) -> list[mx.array]:
    """One node named `label`, of these inputs, with outputs of these shapes and dtypes."""
    kernel = mx.fast.metal_kernel(
        name=f"marker_{label}_end",
        input_names=[f"i{n}" for n in range(len(inputs))],
        output_names=[f"o{n}" for n in range(len(like))],
        source="",
        ensure_row_contiguous=False,
    )
    return kernel(
        inputs=inputs, grid=(1, 1, 1), threadgroup=(1, 1, 1),
        output_shapes=[a.shape for a in like], output_dtypes=[a.dtype for a in like],
    )  # fmt: skip


def _standing_in(label: str, function: Callable) -> Callable:
    """The function, of which only a marker is recorded. What it would record itself tells the output's shape."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not _state.recording:
            return result
        partly = "_partly" if label == "rope" and args[1] < args[0].shape[-1] else ""
        inputs = list(arrays([args, kwargs]))
        if label in CASTING:
            inputs = [a.astype(result.dtype) if mx.issubdtype(a.dtype, mx.floating) else a for a in inputs]
        return marked(label + partly, inputs, result)

    return stand_in


def _contiguous(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    return mark("contiguous", [x], [x])[0] if _state.recording else _state.real["contiguous"](x, *args, **kwargs)


def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Zeros that take the memory of one."""
    zeros = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(zeros)
    return zeros


def launches(compiled: Callable, args: tuple, kwargs: dict) -> tuple[int, int]:
    """How many kernels MLX's compiler makes of a function for arguments like these; the longest chain, and all.

    The chain is shorter where some are side by side: none of them waits for another.
    """

    def blanks(value: Any) -> Any:
        return tree_map(lambda item: blank(item.shape, item.dtype) if isinstance(item, mx.array) else item, value)

    results = list(arrays(compiled(*blanks(args), **blanks(kwargs))))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *results)
        text = file.read_text()
    kernels = dict(re.findall(r'(\d+) \[label ="(\w+)", shape=rectangle\]', text))
    before: dict[str, list[str]] = {}
    for source, target in re.findall(r'^"?(\w+)"? -> "?(\w+)"?$', text, re.MULTILINE):
        before.setdefault(target, []).append(source)

    def depth(end: str) -> int:
        own = end in kernels and kernels[end] not in VIEWS
        return own + max(map(depth, before.get(end, ())), default=0)

    return max(map(depth, kernels)), sum(name not in VIEWS for name in kernels.values())


def _compile(function: Callable | None = None, **options: Any) -> Callable:
    """mx.compile whose result is recorded as a marker."""
    if function is None:
        return lambda function: _compile(function, **options)
    compiled = _state.real["compile"](function, **options)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _state.recording or _state.compiling:
            return compiled(*args, **kwargs)
        _state.compiling = True
        try:
            result = function(*args, **kwargs)
            chain, every = launches(compiled, args, kwargs)
        finally:
            _state.compiling = False
        name = re.sub(r"\W", "", getattr(function, "__name__", "function"))
        return marked(f"compiled_{chain}_{every}_{name}", [args, kwargs], result)

    return wrapped


def marked(label: str, inputs: Any, result: Any) -> Any:
    """The result, of any nesting, with all its arrays coming from one marker."""
    marks = iter(mark(label, list(arrays(inputs)), list(arrays(result))))
    return tree_map(lambda item: next(marks) if isinstance(item, mx.array) else item, result)


@contextmanager
def prepared() -> Iterator[None]:
    """In the block MLX records markers, and tells that there is a Metal GPU. Programs are imported inside of it."""
    fast = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
    standing = [*((mx.fast, name) for name in fast), (mx, "dequantize")]
    others = {
        (mx, "contiguous"): _contiguous,
        (mx, "compile"): _compile,
        (mx.metal, "is_available"): lambda: True,
        (mx, "default_device"): lambda: mx.Device(mx.gpu),
    }
    real = {(module, name): getattr(module, name) for module, name in (*standing, *others)}
    _state.real = {"contiguous": mx.contiguous, "compile": mx.compile}
    for module, name in standing:
        setattr(module, name, _standing_in(name, real[module, name]))
    for (module, name), function in others.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name), function in real.items():
            setattr(module, name, function)


# --- recording -------------------------------------------------------------------------------------------------------


def record(function: Callable, *inputs: mx.array) -> dict[str, Any]:
    """{"nodes": in the order of computation}, ready for JSON.

    A node has "name", "arguments", "inputs" and "outputs", each of the latter as [id, shape, bytes of an element].
    """
    nodes: list[dict[str, Any]] = []

    def keep(event: dict[str, Any]) -> None:
        if event["type"] == "primitive":
            ends = {side: [[a[0], list(a[1]), a[2].size] for a in event[side]] for side in ("inputs", "outputs")}
            nodes.append({"name": event["name"], "arguments": _plain(event["arguments"]), **ends})

    _state.recording = True
    try:
        mx.export_function(keep, function, *inputs)
    finally:
        _state.recording = False
    return {"nodes": nodes}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
