"""Launch the Metal kernels of this folder: `<name>.metal` is the body of a kernel, MLX writes its signature."""

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import mlx.core as mx


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of elementwise operations, compiled into one launch on a GPU.

    Not on the CPU, where MLX would call a C++ compiler for it.
    """
    compiled = mx.compile(function)

    @functools.wraps(function)
    def choose(*arrays: mx.array) -> Any:
        return compiled(*arrays) if mx.default_device() == mx.gpu else function(*arrays)

    return choose


def available() -> bool:
    """Whether kernels can run: on the GPU of a Mac, where that is the default device."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def check(name: str, disagreement: Callable[[], str]) -> bool:
    """Whether a kernel may be used: `disagreement` runs it on a small case and says what is wrong, "" for nothing.

    A kernel that the machine's compiler refuses, or that computes something else, costs a warning and speed and never
    an answer.
    """
    try:
        reason = disagreement()
    except (RuntimeError, ValueError) as error:  # what MLX raises when it cannot compile or launch
        reason = str(error).strip().splitlines()[0]
    if reason:
        warnings.warn(
            f"the Metal kernel {name} is switched off: {reason}. MLX operations take its place, which is slower. "
            "Please report this with your chip and versions",
            RuntimeWarning,
            stacklevel=3,
        )
    return not reason


@functools.cache
def source(name: str) -> str:
    """The body of a kernel."""
    return files("mlx_qwen35.kernels").joinpath(f"{name}.metal").read_text(encoding="utf-8")


@functools.cache
def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Callable[..., list[mx.array]]:
    return mx.fast.metal_kernel(name=name, input_names=list(inputs), output_names=list(outputs), source=source(name))


def launch(
    name: str,
    inputs: Mapping[str, mx.array | int | float],
    outputs: Mapping[str, tuple[tuple[int, ...], mx.Dtype]],
    template: Mapping[str, Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> list[mx.array]:
    """Run a kernel once over a grid of threads and return its outputs.

    Args:
        name: of the file, without .metal.
        inputs: arrays, and numbers, which the kernel sees as int32 or float32.
        outputs: shape and dtype of each; the kernel must write every byte.
        template: compile-time values: int, bool or dtype. Each set of values and dtypes is compiled once.
        grid, threadgroup: both in threads.
    """
    return _kernel(name, tuple(inputs), tuple(outputs))(
        inputs=[as_array(value) for value in inputs.values()],
        template=list(template.items()),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )


def as_array(value: mx.array | int | float) -> mx.array:
    """A number as an array without axes: int32 or float32."""
    if isinstance(value, mx.array):
        return value
    return mx.array(value, mx.int32 if isinstance(value, int) else mx.float32)
