"""The kernels as CUDA: each instantiation compiles where there is nvcc, and each kernel gives the bits that it gives as
Metal, both by the emulator. What a GPU makes of it is seen on one: here, and in test_on_a_gpu.py, which runs on any.
"""

import itertools
import warnings
from unittest import mock

import mlx.core as mx
import pytest
from kernels import cuda, delta_cases, norm_cases, packed_cases, rotary_cases
from kernels.emulator import emulated, missing

from mlx_qwen35.backend import CUDA, assume
from mlx_qwen35.kernels import add_norm, fused, fused_delta, norm_rotary, packed_attention

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
nvcc = pytest.mark.skipif(bool(cuda.missing()), reason=cuda.missing())
emulation = pytest.mark.skipif(bool(missing()), reason=missing())


def gated_delta(heads: fused_delta.Heads) -> None:
    """Decoding, prefill, and a step with drafts; b and a beside the rest or apart."""
    for dtype, (T, stepwise), apart in itertools.product(DTYPES, ((1, False), (33, False), (4, True)), (False, True)):
        delta_cases.case(heads, T, dtype, B=2).launch([T, T // 2], apart, stepwise=stepwise)


def add_norms(width: int) -> None:
    for dtype in DTYPES:
        add_norm.fused_add_norm(*norm_cases.case((1, 5, width), dtype))


def norm_rotaries(sizes: norm_rotary.Geometry) -> None:
    for dtype in DTYPES:
        rotary_cases.case(sizes, 5, dtype, B=2).launch()


def packed_attentions(sizes: packed_attention.Geometry) -> None:
    """Decoding, and a step with three drafts."""
    for dtype, T in itertools.product(DTYPES, (1, 4)):
        packed_cases.case(sizes, T, 300, dtype).launch()


LAUNCHES = {
    "gated_delta of the 4B": (gated_delta, delta_cases.WHOLE, 18),
    "gated_delta, tokens at no multiple of 4 numbers": (gated_delta, delta_cases.ODD, 18),
    "gated_delta of heads of other sizes": (gated_delta, delta_cases.DIFFERENT, 18),
    "add_norm of the 4B": (add_norms, norm_cases.WHOLE, 3),
    "add_norm of a width that is no multiple": (add_norms, 136, 3),
    "norm_rotary of the 4B": (norm_rotaries, rotary_cases.WHOLE, 3),
    "norm_rotary of an odd number of heads": (norm_rotaries, rotary_cases.ODD, 3),
    "packed_attention of the 4B": (packed_attentions, packed_cases.WHOLE, 9),
    "packed_attention of keys and values of different bits": (packed_attentions, packed_cases.ODD, 9),
    "packed_attention of eight rows": (packed_attentions, packed_attention.Geometry(8, 256, 4, 4), 9),
}


def programs(case: str) -> list[cuda.Program]:
    launch, sizes, count = LAUNCHES[case]
    with cuda.recorded() as found:
        launch(sizes)
    assert len(found) == count
    return list(found.values())


@pytest.mark.core(1)
@nvcc
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.full) if case.startswith(("gated", "packed")) else case
        for case in LAUNCHES
    ],
)
def test_every_instantiation_compiles_and_a_block_of_it_fits(case, tmp_path):
    made = programs(case)
    used = cuda.compile_programs(made, tmp_path)
    for program in made:
        threads, takes = program.block[0] * program.block[1] * program.block[2], used[program.name]
        assert threads * -(-takes.registers // 8) * 8 <= cuda.REGISTERS, f"{program.name}: {takes}"
        assert takes.shared <= cuda.SHARED and not takes.spilled, f"{program.name}: {takes}"


MUTANTS = {
    "a function is missing": ("using metal::simd_shuffle_xor;", ""),
    "a word of Metal stays": ("#define device\n", ""),
    "a position is missing": ("#define threadgroup_position_in_grid metal::of_grid()\n", ""),
    "CUDA's float4 takes the place of ours": ("using metal::float4;", ""),
    "a vector of halves does not convert": ("template <typename U>\n  __device__ explicit", "__device__ explicit"),
}


@pytest.mark.core(1)
@nvcc
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_header_that_lacks_something_does_not_compile(mutant, tmp_path):
    right, wrong = MUTANTS[mutant]
    real = fused.source
    header = real("metal", "cuh")
    assert header.count(right) == 1
    broken = header.replace(right, wrong)
    with mock.patch.object(fused, "source", lambda name, kind="metal": broken if kind == "cuh" else real(name)):
        made = programs("gated_delta, tokens at no multiple of 4 numbers")
    with pytest.raises(RuntimeError, match="error"):
        cuda.compile_programs(made[:1], tmp_path)


# --- what the programs compute, by the emulator -----------------------------------------------------------------------


def delta_answers(T: int, dtype: mx.Dtype) -> list[mx.array]:
    """Of rows of different lengths, b and a beside the rest and apart, and of each token."""
    given, lengths = delta_cases.case(delta_cases.ODD, T, dtype, B=2), [T, T // 2]
    calls = ((False, False), (True, False), (False, True))
    return [array for apart, each in calls for array in given.launch(lengths, apart, stepwise=each)]


ANSWERS = {
    "gated_delta, one token": lambda dtype: delta_answers(1, dtype),
    "gated_delta, several": lambda dtype: delta_answers(19, dtype),
    "add_norm": lambda dtype: add_norm.fused_add_norm(*norm_cases.case((2, 3, 136), dtype)),
    "norm_rotary": lambda dtype: rotary_cases.case(rotary_cases.ODD, 3, dtype, B=2).launch(),
    "packed_attention": lambda dtype: [packed_cases.two_blocks(dtype).launch()],
}


def differing(kernel: str, dtype: mx.Dtype) -> bool:
    """Whether the text as CUDA and the text as Metal give other bits, on the same compiler and arithmetic."""
    with emulated():
        metal = list(ANSWERS[kernel](dtype))
        mx.eval(metal)
    with cuda.emulated() as ran:
        ours = list(ANSWERS[kernel](dtype))
    assert ran
    return not delta_cases.same(ours, metal)


@pytest.mark.core(4)
@emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ANSWERS)
def test_as_cuda_a_kernel_computes_the_same_bits_as_as_metal(kernel, dtype):
    assert not differing(kernel, dtype)


WRONG = {
    "exp": ("return ::expf(x);", "return ::expf(-x);"),
    "the exp of a vector": ("::expf(v.y)", "::expf(v.x)"),
    "log": ("return ::logf(x);", "return ::logf(x) + 1.0f;"),
    "rsqrt": ("return ::rsqrtf(x);", "return 1.0f / x;"),
    "fma": ("return ::fmaf(a, b, c);", "return ::fmaf(a, b, -c);"),
    "the fma of a vector": ("::fmaf(a.z, b.z, c.z)", "::fmaf(a.z, b.z, c.y)"),
    "min": ("return b < a ? b : a;", "return a;"),
    "max": ("return a < b ? b : a;", "return a;"),
    "a product of vectors": ("a.w * b.w}", "a.w * b.z}"),
    "a product of a vector and a number": ("a.x * b, a.y * b", "a.x * b, a.y + b"),
    "a quotient": ("a.x / b.x", "a.x * b.x"),
    "minus": ("return {-a.x", "return {a.x"),
    "a sum": ("return {a + b.x", "return {a - b.x"),
    "conversion": ("T(float(o.x)), T(float(o.y))", "T(float(o.y)), T(float(o.x))"),
    "shuffle": ("0xffffffffu, x, mask", "0xffffffffu, x, mask / 2"),
    "the position in the threadgroup": ("return {threadIdx.x,", "return {threadIdx.y,"),
    "the threadgroup's position": ("blockIdx.x, blockIdx.y, blockIdx.z", "blockIdx.x, blockIdx.z, blockIdx.y"),
}


@emulation
@pytest.mark.parametrize("fault", [name if name in ("exp", "shuffle") else pytest.param(name, marks=pytest.mark.full)
                                   for name in WRONG])  # fmt: skip
def test_a_header_that_means_something_else_gives_other_bits(fault):
    right, wrong = WRONG[fault]
    real = fused.source
    header = real("metal", "cuh")
    assert header.count(right) == 1
    broken = header.replace(right, wrong)
    with mock.patch.object(fused, "source", lambda name, kind="metal": broken if kind == "cuh" else real(name)):
        assert differing("gated_delta, several", mx.float16)


# --- how MLX is asked -------------------------------------------------------------------------------------------------


def test_arrays_of_a_threadgroup_are_shared_and_loops_stay_unrolled():
    (function, *_) = (program.function for program in programs("gated_delta of the 4B"))
    assert function.count("__shared__ float4 ") == 2 and function.count("__shared__ float scalars[") == 1
    assert "#pragma clang" not in function and "#pragma unroll" in function
    assert "const auto tokens = *tokens_pointer;" in function


def test_a_grid_that_is_no_multiple_of_the_threadgroup_gets_a_smaller_one():
    (program, *_) = programs("norm_rotary of an odd number of heads")
    assert (program.grid, program.block) == ((32, 7, 10), (32, 1, 1))


def test_programs_that_differ_in_a_dtype_alone_differ_in_name():
    names = []
    for gates in (mx.float32, mx.float16):
        given = delta_cases.case(delta_cases.ODD, 1, mx.float16)
        projected = [*mx.split(given.projected, [given.heads.C + given.heads.Hv * given.heads.Dv], axis=-1)]
        with cuda.recorded() as found:
            products = [projected[0], projected[1].astype(gates)]
            fused_delta.fused_gated_delta(products, given.weights, given.memory)
        names += found
    assert len(set(names)) == 2


@pytest.mark.skipif(mx.cuda.is_available(), reason="MLX for CUDA builds the kernel")
def test_a_kernel_that_cannot_be_built_costs_a_warning_and_no_answer():
    add_norm.self_check.cache_clear()
    given = norm_cases.case((1, 5, 96), mx.float32)
    with assume(CUDA), pytest.warns(RuntimeWarning, match="the kernel add_norm is switched off: .*CUDA"):
        out = add_norm.add_norm(*given)
    add_norm.self_check.cache_clear()
    assert not norm_cases.differences(out, add_norm.plain_add_norm(*given))


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_an_nvidia_gpu_every_kernel_passes_its_check(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_delta.self_check(delta_cases.WHOLE, dtype) and fused_delta.self_check(delta_cases.ODD, dtype)
        assert add_norm.self_check(norm_cases.WHOLE, dtype) and norm_rotary.self_check(rotary_cases.WHOLE, dtype)
        assert packed_attention.self_check(packed_cases.WHOLE, dtype)


@pytest.mark.cuda
def test_on_an_nvidia_gpu_ten_launches_have_the_same_bits():
    given = delta_cases.case(delta_cases.WHOLE, 130, mx.bfloat16, B=2)
    first = given.launch([130, 77])
    assert all(delta_cases.same(given.launch([130, 77]), first) for _ in range(9))


