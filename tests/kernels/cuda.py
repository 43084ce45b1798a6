"""The CUDA programs that MLX would compile on an NVIDIA GPU, on any machine, and nvcc to compile them with.

MLX writes a program of a kernel's definition and arguments (mlx/backend/cuda/custom_kernel.cpp): `program` writes the
same, but for MLX's own header, of which the kernels use nothing.
"""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from kernels.emulator import forget_kernels

from mlx_qwen35.backend import CUDA, assume

TYPES = {
    mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.int32: "int32_t", mx.uint32: "uint32_t",
}  # fmt: skip
INCLUDES = "#include <cooperative_groups.h>\n#include <cstdint>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
REGISTERS = 65_536  # of a multiprocessor, of all NVIDIA GPUs that MLX runs on: a block's threads share them
SHARED = 48 << 10  # bytes of shared memory that a block may declare


@dataclass(frozen=True)
class Program:
    """One kernel of one instantiation, and how it was launched."""

    name: str
    header: str
    function: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    registers: int  # of a thread
    shared: int  # bytes
    spilled: int  # bytes of registers that lie in memory


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Program]]:
    """Within, the backend is CUDA, and launches give zeros; the programs, by name."""
    programs: dict[str, Program] = {}

    def cuda_kernel(**definition: Any) -> Callable[..., list[mx.array]]:
        def call(**arguments: Any) -> list[mx.array]:
            made = program(definition, **arguments)
            assert programs.setdefault(made.name, made).function == made.function, f"two programs named {made.name}"
            return [mx.zeros(*out) for out in zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)]

        return call

    forget_kernels()
    try:
        with mock.patch.object(mx.fast, "cuda_kernel", cuda_kernel), assume(CUDA):
            yield programs
    finally:
        forget_kernels()


def program(
    definition: dict[str, Any],
    inputs: Sequence[mx.array],
    template: Sequence[tuple[str, Any]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
) -> Program:
    """What MLX makes of a kernel's definition and a call."""
    name = "_".join([definition["name"], *(_tag(value) for _, value in template)])
    reads = zip(definition["input_names"], inputs, strict=True)
    parameters = [f"const {TYPES[array.dtype]}* {each}" for each, array in reads]
    writes = zip(definition["output_names"], output_dtypes, strict=True)
    parameters += [f"{TYPES[dtype]}* {each}" for each, dtype in writes]
    constants = "".join(f"  {_constant(*item)};\n" for item in template)
    function = f"__global__ void {name}({', '.join(parameters)}) {{\n{constants}{definition['source']}\n}}\n"
    assert len(output_shapes) == len(output_dtypes)
    assert all(g % t == 0 for g, t in zip(grid, threadgroup, strict=True)), "CUDA would start threads beyond the grid"
    return Program(name, definition["header"], function, grid, threadgroup)


def _tag(value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return TYPES[value]
    return {True: "t", False: "f"}[value] if isinstance(value, bool) else str(value)


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPES[value]}"
    return f"constexpr {type(value).__name__} {name} = {str(value).lower()}"


def missing() -> str:
    """Why nothing can be compiled here; "" where it can."""
    return "" if shutil.which("nvcc") else "needs nvcc, the compiler of the CUDA toolkit, on the path"


def compile_programs(programs: Sequence[Program], folder: Path, architecture: str = "sm_90") -> dict[str, Resources]:
    """Compile programs with one header as one file; name -> resources. RuntimeError with what nvcc says against it."""
    (header,) = {program.header for program in programs}
    functions = "".join(program.function for program in programs)
    text = f"{INCLUDES}{header}\nnamespace mlx::core::cu {{\nnamespace cg = cooperative_groups;\n{functions}}}\n"
    file = folder / "kernels.cu"
    file.write_text(text)
    out = file.with_suffix(".cubin")
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", str(out), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        done.stderr,
        re.DOTALL,
    )
    used = {name: Resources(int(regs), int(smem or 0), int(a) + int(b)) for name, a, b, regs, smem in found}
    return {p.name: next(value for name, value in used.items() if f"{len(p.name)}{p.name}E" in name) for p in programs}
