"""Launches and self-checks of the kernels. `<name>.metal` is the body of a kernel; MLX writes its signature.

On an NVIDIA GPU the same body is compiled as CUDA, behind metal.cuh, which defines the part of Metal that it uses.
"""

import functools
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import mlx.core as mx

from mlx_qwen35.backend import backend

Case = tuple[str, mx.array, mx.array, float | mx.array]  # an output's name, the kernel's, the definition's, tolerance
Shape = tuple[int, ...]
# What rounding explains of the difference between two orders of the same sums, relative to the largest number.
ROUNDING = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@functools.cache
def source(name: str, kind: str = "metal") -> str:
    """The body of a kernel, or the text of a header (kind: "cuh")."""
    return files("mlx_qwen35.kernels").joinpath(f"{name}.{kind}").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Kernel:
    """The text of a kernel, and the names of its inputs and outputs in order."""

    name: str
    body: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scalars: tuple[str, ...]  # the inputs without axes

    def for_metal(self) -> Callable[..., list[mx.array]]:
        return mx.fast.metal_kernel(  # type: ignore[return-value]  # MLX's stub says object
            name=self.name, input_names=list(self.inputs), output_names=list(self.outputs), source=self.body
        )

    def for_cuda(self, dtypes: tuple[mx.Dtype, ...]) -> Callable[..., list[mx.array]]:
        """dtypes: of the inputs. The name holds a checksum of text and dtypes, since MLX may cache kernels by name."""
        # A header cannot define three things: `threadgroup` declares shared arrays, and pointers to them; a pragma; and
        # an input without axes is a reference in Metal, and a pointer in CUDA.
        body = re.sub(r"^( *)threadgroup (?=\w+ \w+\[)", r"\1__shared__ ", self.body, flags=re.MULTILINE)
        body = body.replace("#pragma clang loop unroll(full)", "#pragma unroll")
        body = "".join(f"const auto {name} = *{name}_pointer;\n" for name in self.scalars) + body
        header = source("metal", "cuh")
        return mx.fast.cuda_kernel(  # type: ignore[return-value]  # MLX's stub says object
            name=f"{self.name}_{zlib.crc32(repr((header, body, dtypes)).encode()):08x}",
            input_names=[f"{name}_pointer" if name in self.scalars else name for name in self.inputs],
            output_names=list(self.outputs),
            source=body,
            header=header,
        )


@functools.cache
def _built(kernel: Kernel, dtypes: tuple[mx.Dtype, ...], language: str) -> Callable[..., list[mx.array]]:
    return kernel.for_cuda(dtypes) if language == "cuda" else kernel.for_metal()


def launch(
    name: str,
    inputs: Mapping[str, mx.array | int | float],
    outputs: Mapping[str, tuple[Shape, mx.Dtype]],
    template: Mapping[str, Any],
    grid: Shape,
    threadgroup: Shape,
) -> list[mx.array]:
    """Run a kernel once over a grid of threads and return its outputs.

    Args:
        name: of the file, without .metal.
        inputs: arrays, and numbers, which the kernel reads as int32 or float32.
        outputs: shape and dtype of each; the kernel must write every byte.
        template: compile-time values: int, bool or dtype. Each set of values and dtypes is compiled once.
        grid, threadgroup: (x, y, z) in threads. CUDA needs whole threadgroups, so there they may become smaller.
    """
    arrays = {key: as_array(value) for key, value in inputs.items()}
    scalars = tuple(key for key, array in arrays.items() if array.ndim == 0)
    kernel = Kernel(name, source(name), tuple(inputs), tuple(outputs), scalars)
    language = backend().kernel_language
    whole = tuple(map(math.gcd, grid, threadgroup)) if language == "cuda" else threadgroup
    return _built(kernel, tuple(array.dtype for array in arrays.values()), language)(
        inputs=list(arrays.values()),
        template=list(template.items()),
        grid=grid,
        threadgroup=whole,
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )


def as_array(value: mx.array | int | float) -> mx.array:
    """A number as an array without axes: int32 or float32."""
    if isinstance(value, mx.array):
        return value
    return mx.array(value, mx.int32 if isinstance(value, int) else mx.float32)


# --- checks ----------------------------------------------------------------------------------------------------------


def agrees(name: str, cases: Callable[[], Iterable[Case]]) -> bool:
    """Whether a kernel may be used here. `cases` runs the kernel and its definition on small inputs.

    A kernel that does not compile, or differs, costs a warning and speed. It never costs a right answer.
    """
    try:
        reason = next(filter(None, (_difference(*case) for case in cases())), "")
    except (RuntimeError, ValueError) as error:  # what MLX raises when it cannot compile or launch
        reason = str(error).strip().splitlines()[0]
    if reason:
        warnings.warn(
            f"the kernel {name} is switched off: {reason}. MLX operations take its place, which is slower. Please "
            "report this with your chip and versions",
            RuntimeWarning,
            stacklevel=3,
        )
    return not reason


def _difference(name: str, ours: mx.array, definition: mx.array, allowed: float | mx.array) -> str:
    error = mx.abs(ours.astype(mx.float32) - definition.astype(mx.float32))
    if (error <= allowed).all().item():  # not NaN
        return ""
    return f"its {name} differs from the definition's by {error.max().item():.1e}"


def relative(step: float, definition: mx.array) -> mx.array:
    """The tolerance for an output: `step` times its largest magnitude, or times 1 where that is smaller."""
    return step * mx.maximum(1.0, mx.abs(definition.astype(mx.float32)).max())


def normal_arrays(*shapes: Shape) -> list[mx.array]:
    """Normally distributed float32 arrays, the same on every machine."""
    keys = mx.random.split(mx.random.key(0), len(shapes))
    return [mx.random.normal(shape, key=key, stream=mx.cpu) for shape, key in zip(shapes, keys, strict=True)]
