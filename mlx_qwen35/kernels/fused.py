"""Launch the kernels of this folder, and check them: `<name>.metal` is the body of a kernel, MLX writes its signature.

On an NVIDIA GPU the same body is compiled as CUDA, behind metal.cuh, which defines there what it uses of Metal.
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

Case = tuple[str, mx.array, mx.array, float | mx.array]  # an output's name, it, what it should be, the error allowed


@functools.cache
def source(name: str, kind: str = "metal") -> str:
    """The body of a kernel, or a header (kind: "cuh")."""
    return files("mlx_qwen35.kernels").joinpath(f"{name}.{kind}").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Kernel:
    """A kernel to be built: its name, body, inputs and outputs in order, and which inputs have no axes."""

    name: str
    body: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scalars: tuple[str, ...]

    def for_metal(self) -> Callable[..., list[mx.array]]:
        names = {"input_names": list(self.inputs), "output_names": list(self.outputs)}
        return mx.fast.metal_kernel(name=self.name, source=self.body, **names)

    def for_cuda(self, dtypes: tuple[mx.Dtype, ...]) -> Callable[..., list[mx.array]]:
        """dtypes: of the inputs. With the text they go into the name, by which MLX may keep what it has compiled."""
        # What a header cannot define: an array shared by the threads is declared with the word that pointers to it have
        # too; a pragma; and an input without axes, a reference on Metal, is a pointer.
        body = re.sub(r"^( *)threadgroup (?=\w+ \w+\[)", r"\1__shared__ ", self.body, flags=re.MULTILINE)
        body = body.replace("#pragma clang loop unroll(full)", "#pragma unroll")
        body = "".join(f"const auto {name} = *{name}_pointer;\n" for name in self.scalars) + body
        header = source("metal", "cuh")
        return mx.fast.cuda_kernel(
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
        grid, threadgroup: both in threads. CUDA has no threadgroups that are not whole, so there they may be smaller.
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
    """Whether a kernel may be used here: `cases` runs it, and its definition, on small inputs.

    A kernel that the machine's compiler refuses, or that computes something else, costs a warning and speed and never
    an answer.
    """
    if not backend().checks_kernels:
        return True
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
    """The error that `step` allows where the largest number is above 1: so many times that number."""
    return step * mx.maximum(1.0, mx.abs(definition.astype(mx.float32)).max())
