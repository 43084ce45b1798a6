"""The CUDA programs that MLX would compile on an NVIDIA GPU, on any machine: nvcc compiles, the emulator runs them.

MLX writes a program of a kernel's definition and arguments (mlx/backend/cuda/custom_kernel.cpp): `program` writes the
same, but for MLX's own header, of which the kernels use nothing.
"""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from kernels.capture import Buffer, Launch, Parameter
from kernels.emulator import array_of, bytes_of, forget_kernels
from kernels.emulator.build import compiled, threadgroup_variables
from kernels.emulator.run import run

from mlx_qwen35.backend import CUDA, Backend, assume, backend

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
    parameters: tuple[tuple[str, str], ...]  # type and name of each, outputs last
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

    def zeros(_: Program, inputs: Sequence[mx.array], outputs: Sequence[tuple]) -> list[mx.array]:
        return [mx.zeros(*output) for output in outputs]

    with _standing_in(zeros, CUDA) as programs:
        yield programs


@contextlib.contextmanager
def emulated() -> Iterator[dict[str, Program]]:
    """Within, the emulator runs what an NVIDIA GPU would; the programs, by name."""
    with _standing_in(emulate, replace(backend(), kernel_language="cuda")) as programs:
        yield programs


@contextlib.contextmanager
def _standing_in(launch: Callable[..., list[mx.array]], on: Backend) -> Iterator[dict[str, Program]]:
    programs: dict[str, Program] = {}

    def cuda_kernel(**definition: Any) -> Callable[..., list[mx.array]]:
        def call(**arguments: Any) -> list[mx.array]:
            made = program(definition, **arguments)
            assert programs.setdefault(made.name, made).function == made.function, f"two programs named {made.name}"
            outputs = list(zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True))
            return launch(made, arguments["inputs"], outputs)

        return call

    forget_kernels()
    try:
        with mock.patch.object(mx.fast, "cuda_kernel", cuda_kernel), assume(on):
            yield programs
    finally:
        forget_kernels()


def emulate(program: Program, inputs: Sequence[mx.array], outputs: Sequence[tuple]) -> list[mx.array]:
    """Run a program's header and function as C++ on the emulator's runtime, see emulator/cuda.h."""
    types, names = zip(*program.parameters, strict=True)
    body = threadgroup_variables(program.function.replace("__shared__", "threadgroup"))
    arguments = ", ".join(f"({kind})buffers[{i}]" for i, kind in enumerate(types))
    text = (
        f'#include "cuda.h"\n{program.header}\nnamespace mlx::core::cu {{\n{body}}}\n'
        'extern "C" void emu_kernel(void** buffers, const emu_Attributes*) {\n'
        f"  mlx::core::cu::{program.name}({arguments});\n}}\n"
    )
    shapes = [(array.shape, array.dtype) for array in inputs] + list(outputs)
    buffers = [Buffer(name, "device", *shape, name) for name, shape in zip(names, shapes, strict=True)]
    parameters = tuple(Parameter(name, "buffer", kind, name) for kind, name in program.parameters)
    reads, writes = tuple(buffers[: len(inputs)]), tuple(buffers[len(inputs) :])
    launch = Launch(program.name, "", (), text, program.grid, program.block, parameters, reads, writes, True)
    results, report = run(compiled(text), launch, [bytes_of(array) for array in inputs])
    assert not report.faults, report.faults
    return [array_of(data, *output) for data, output in zip(results, outputs, strict=True)]


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
    parameters = [(f"const {TYPES[array.dtype]}*", each) for each, array in reads]
    writes = zip(definition["output_names"], output_dtypes, strict=True)
    parameters += [(f"{TYPES[dtype]}*", each) for each, dtype in writes]
    constants = "".join(f"  {_constant(*item)};\n" for item in template)
    signature = ", ".join(map(" ".join, parameters))
    function = f"__global__ void {name}({signature}) {{\n{constants}{definition['source']}\n}}\n"
    assert len(output_shapes) == len(output_dtypes)
    assert all(g % t == 0 for g, t in zip(grid, threadgroup, strict=True)), "CUDA would start threads beyond the grid"
    return Program(name, definition["header"], function, tuple(parameters), grid, threadgroup)


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
