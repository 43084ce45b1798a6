"""Small kernels for the tests of the emulator: one body, arrays by name, one launch."""

from typing import Any

import mlx.core as mx
from kernels.emulator import Report, emulate


def run(
    source: str,
    inputs: dict[str, Any],
    output: tuple[tuple[int, ...], mx.Dtype],
    grid: int | tuple[int, int, int] = 32,
    threadgroup: int | tuple[int, int, int] = 32,
    template: dict[str, Any] | None = None,
    header: str = "",
    init_value: float | None = None,
    **emulation: Any,
) -> tuple[mx.array, Report]:
    """Emulate a launch of the body `source` with one output, `out`.

    The body may use `i`, `lane` and `group`: the thread's place in the grid, its lane, its simdgroup. A number as
    `grid` or `threadgroup` means (n, 1, 1).
    """
    prologue = """
        uint i = thread_position_in_grid.x;
        uint lane = thread_index_in_simdgroup;
        uint group = simdgroup_index_in_threadgroup;
    """

    def function(*arrays: Any) -> mx.array:
        kernel = mx.fast.metal_kernel(
            name="small", input_names=list(inputs), output_names=["out"], source=prologue + source, header=header
        )
        return kernel(
            inputs=list(arrays),
            template=list((template or {}).items()),
            grid=_triple(grid),
            threadgroup=_triple(threadgroup),
            output_shapes=[output[0]],
            output_dtypes=[output[1]],
            init_value=init_value,
        )[0]

    return emulate(function, *inputs.values(), **emulation)


def _triple(size: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (size, 1, 1) if isinstance(size, int) else size
