"""The kernels on a GPU, of a Mac or of NVIDIA, at the sizes of the 4B and at small ones, against MLX operations there.

Each test runs twice over: launched for real where it is marked `gpu`, and in one case or two by the emulator, so that
the test's own code is known to work before it reaches a GPU.

What is not known until these have run on one: whether Apple's compiler takes the texts; whether a pipeline may have as
many threads as it is launched with (gated_delta's state fills the registers; MLX does not ask); what Metal's exp, log
and rsqrt, its flushing of denormal numbers, and products and sums that the compiler joins cost in digits; and all
speeds. Products of the operations, the yardstick, are of whole float32 numbers (tests/conftest.py sees to that). With
MLX_ENABLE_TF32=1, as programs run that set nothing on an M5, the checks at load must still pass (-k check_at_load).
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from kernels import delta_cases, norm_cases, packed_cases, rotary_cases
from kernels.backends import EMULATED, OPERATIONS
from kernels.emulator import emulated, missing

from mlx_qwen35 import load
from mlx_qwen35.backend import assume
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.rope_fields import rescaled
from mlx_qwen35.generate import batch_generate, generate
from mlx_qwen35.kernels import add_norm, fused, fused_delta, norm_rotary, packed_attention
from mlx_qwen35.kernels.gated_delta import DeltaState
from mlx_qwen35.model.rotary import CHECKED, EXACT, Rotary, table_error

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
LENGTHS = (1, 2, 17, 130)
HEADS = (delta_cases.ODD, delta_cases.WHOLE)
WIDTHS = (136, norm_cases.WHOLE)
ATTENTION = (rotary_cases.ODD, rotary_cases.WHOLE)
PACKED = (packed_cases.ODD, packed_cases.WHOLE)
Run = Callable[[Callable[[], Any]], Any]  # evaluates what a function of no arguments gives, its kernels launched


def on_the_gpu(function: Callable[[], Any]) -> Any:
    outputs = function()
    mx.eval(outputs)
    return outputs


def in_the_emulator(function: Callable[[], Any]) -> Any:
    with assume(EMULATED), emulated():
        forget_checks()
        try:
            return on_the_gpu(function)
        finally:
            forget_checks()


def forget_checks() -> None:
    for module in (fused_delta, add_norm, norm_rotary, packed_attention):
        module.self_check.cache_clear()


def runs(names: str, on_a_mac: Iterable[tuple], here: Iterable[tuple]) -> pytest.MarkDecorator:
    """Parametrizes a test by `run` and names: on a Mac all the first cases, in the emulator the others."""
    off = pytest.mark.skipif(bool(missing()), reason=missing())
    cases = [pytest.param(on_the_gpu, *case, marks=pytest.mark.gpu) for case in on_a_mac]
    cases += [pytest.param(in_the_emulator, *case, marks=off) for case in here]
    return pytest.mark.parametrize(f"run, {names}", cases, ids=label)


def label(value: Any) -> str | None:
    """The part of a test's name that stands for a value; None leaves it to pytest."""
    if isinstance(value, fused_delta.Heads | norm_rotary.Geometry | packed_attention.Geometry):
        return "4B" if value in (HEADS[1], ATTENTION[1], PACKED[1]) else "small"
    return str(value) if isinstance(value, mx.Dtype) else None


def none(found: list[str]) -> None:
    assert not found, found


# --- the answers -----------------------------------------------------------------------------------------------------


@pytest.mark.core(6)
@runs("heads, dtype, T", itertools.product(HEADS, DTYPES, LENGTHS), [(HEADS[0], mx.float16, 17)])
def test_gated_delta_gives_what_the_operations_give(run: Run, heads, dtype, T):
    given, lengths = delta_cases.case(heads, T, dtype, B=2), [T, T // 2]
    out, window, state = run(lambda: given.launch(lengths))
    want, want_window, want_state = given.plain(lengths)
    none(delta_cases.differences(out, want, state, want_state))
    assert delta_cases.same([window], [want_window])


@runs("heads, dtype, T", itertools.product(HEADS, DTYPES, LENGTHS[1:]), [(HEADS[0], mx.float16, 17)])
def test_a_token_has_the_same_bits_among_others_and_alone(run: Run, heads, dtype, T):
    given = delta_cases.case(heads, T, dtype)

    def one_by_one() -> tuple[mx.array, ...]:
        outputs, memory = [], given.memory
        for t in range(T):
            token = replace(given, projected=given.projected[:, t : t + 1], memory=memory)
            out, *memory = token.launch()
            outputs, memory = [*outputs, out], DeltaState(*memory)
        return mx.concatenate(outputs, axis=1), *memory

    assert delta_cases.same(run(one_by_one), run(given.launch))


@runs("heads, T", itertools.product(HEADS, LENGTHS), [(HEADS[0], 2)])
def test_memory_after_each_token_ends_in_that_of_the_whole(run: Run, heads, T):
    given = delta_cases.case(heads, T, mx.float16)
    out, windows, states = run(lambda: given.launch(stepwise=True))
    assert delta_cases.same((out, windows[:, -1], states[:, -1]), run(given.launch))


@runs("heads, dtype, T", itertools.product(HEADS, DTYPES, (2, 3, 4)), [(HEADS[0], mx.float16, 4)])
def test_memories_of_several_tokens_are_to_the_bit_those_of_single_ones(run: Run, heads, dtype, T):
    given, lengths = delta_cases.case(heads, T, dtype, B=3), [T, 0, T - 1]
    at_once = run(lambda: given.launch(lengths, stepwise=True))
    assert delta_cases.same(at_once, run(lambda: given.one_by_one(lengths)))


@runs("width, dtype, T", itertools.product(WIDTHS, DTYPES, LENGTHS), [(WIDTHS[0], mx.bfloat16, 17)])
def test_sum_and_norm_equal_those_of_operations(run: Run, width, dtype, T):
    given = norm_cases.case((2, T, width), dtype)
    ours, want = run(lambda: add_norm.fused_add_norm(*given)), add_norm.plain_add_norm(*given)
    none(norm_cases.differences(ours, want))
    assert dtype == mx.float32 or norm_cases.unequal(ours, want) < 1e-2


@runs("sizes, dtype, T", itertools.product(ATTENTION, DTYPES, LENGTHS), [(ATTENTION[0], mx.bfloat16, 17)])
def test_queries_and_keys_equal_those_of_operations(run: Run, sizes, dtype, T):
    given = rotary_cases.case(sizes, T, dtype, B=2)
    ours, want = run(given.launch), given.plain()
    none(rotary_cases.differences(ours, want, sizes.dims))
    assert dtype == mx.float32 or rotary_cases.unequal(ours, want) < 1e-2


@runs("sizes, dtype, T, S", itertools.product(PACKED, DTYPES, (1, 2, 3, 4, 7), (63, 257, 4096)),
      [(PACKED[0], mx.float16, 4, 63)])  # fmt: skip
def test_attention_over_packed_keys_gives_the_answer(run: Run, sizes, dtype, T, S):
    given = packed_cases.case(sizes, T, S, dtype, Hk=4)
    none(packed_cases.differences(run(given.launch), given.plain(), scores=4.0))  # exp and divisions are the GPU's own


@runs("sizes, dtype", itertools.product(PACKED, DTYPES), [(PACKED[0], mx.float16)])
def test_a_query_over_packed_keys_has_the_same_bits_among_others_and_alone(run: Run, sizes, dtype):
    given = packed_cases.case(sizes, 4, 2 * packed_cases.BLOCK + 2, dtype)
    alone = [run(given.alone(t).launch) for t in range(4)]
    assert mx.array_equal(run(given.launch), mx.concatenate(alone, axis=2))


@runs("name, position", itertools.product(("default", "yarn:4.0"), CHECKED), [("yarn:4.0", CHECKED[-1])])
def test_cosines_and_sines_of_far_positions_are_exact(run: Run, name, position):
    """Where this fails, models compute the table on the CPU: tests/model/test_rotary.py."""
    rope = parse_config(rescaled(geometry("4b"), None if name == "default" else name)).text.rope
    rotary = Rotary(rope)
    cos, sin = run(lambda: rotary.table(mx.array([[position]])))
    angles = (np.float32(position) * np.array(rotary.frequencies)).astype(np.float64)
    for ours, exact in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        assert np.abs(np.array(ours).ravel() / rotary.factor - exact).max() < 1e-6
    assert table_error(rope, [position]) < EXACT


# --- the choice ------------------------------------------------------------------------------------------------------

CHECKS = [
    *((fused_delta.self_check, heads) for heads in HEADS),
    *((add_norm.self_check, width) for width in WIDTHS),
    *((norm_rotary.self_check, sizes) for sizes in ATTENTION),
    *((packed_attention.self_check, sizes) for sizes in PACKED),
]  # small and 4B of each


@runs("self_check, sizes, dtype", [(*v, d) for v in CHECKS for d in DTYPES], [(*v, mx.float16) for v in CHECKS[::2]])
def test_each_kernel_passes_its_check_at_load_without_a_warning(run: Run, self_check, sizes, dtype):
    forget_checks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(lambda: self_check(sizes, dtype)) is True


@pytest.mark.full
@runs("T", [(T,) for T in LENGTHS], [(1,), (2,)])
def test_no_threadgroup_has_more_threads_than_a_pipeline_may_have(run: Run, T):
    launches = []

    def spy(name: str, inputs, outputs, template, grid, threadgroup):
        launches.append((name, threadgroup[0] * threadgroup[1] * threadgroup[2]))
        return launch(name, inputs, outputs, template, grid, threadgroup)

    launch = fused.launch
    given = norm_cases.case((1, T, norm_cases.WHOLE), mx.float16)
    with mock.patch.object(fused, "launch", spy):
        for heads in (*HEADS, delta_cases.REAL, delta_cases.DIFFERENT):
            run(delta_cases.case(heads, T, mx.float16).launch)
        run(lambda: add_norm.fused_add_norm(*given))
        run(rotary_cases.case(rotary_cases.WHOLE, T, mx.float16).launch)
        run(packed_cases.case(packed_cases.WHOLE, min(T, 8), 64, mx.float16, Hk=1).launch)
    packed = ["packed_attention", "packed_attention_join"]
    assert [name for name, _ in launches] == ["gated_delta"] * 4 + ["add_norm", "norm_rotary", *packed]
    many_registers = ("gated_delta", "packed_attention")
    assert all(threads <= (512 if name in many_registers else 1024) for name, threads in launches)


# --- the model -------------------------------------------------------------------------------------------------------

CLOSE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 8e-2}  # of logits, relative to the largest


def nano(dtype: mx.Dtype, use: Callable[..., Any]) -> Callable[[], Any]:
    """use(model, processor) of nano loaded in a dtype."""
    return lambda: use(*load("nano", dtype=str(dtype).removeprefix("mlx.core.")))


def both(run: Run, function: Callable[[], Any]) -> tuple[Any, Any]:
    """What it gives with the kernels, of which each must have been launched beyond its check, and with operations."""
    with mock.patch.object(fused, "launch", wraps=fused.launch) as launch:
        by_kernels = run(function)
        launches = Counter(call.args[0] for call in launch.call_args_list)
        assert all(launches[name] > 2 for name in ("gated_delta", "add_norm", "norm_rotary"))
        launch.reset_mock()
        with assume(OPERATIONS):
            plain = on_the_gpu(function)
        launch.assert_not_called()
    return by_kernels, plain


@pytest.mark.core(1)
@runs("question", [("What is 34 + 58?",), ("Who are you?",)], [("What is 34 + 58?",)])
def test_nano_generates_the_same_tokens_with_kernels_and_with_operations(run: Run, question):
    def tokens(model, processor) -> list[int]:
        return generate(model, processor, question, max_tokens=24, prefill_step_size=13).tokens

    fused, plain = both(run, nano(mx.float32, tokens))
    assert fused == plain and len(fused) > 3


@pytest.mark.core(2)
@runs("depth", [(1,), (2,), (3,)], [(2,)])
def test_nano_generates_the_same_tokens_with_drafts_on_kernels_and_on_operations(run: Run, depth):
    def tokens(model, processor) -> list[tuple[int, ...]]:
        options = {"max_tokens": 12, "seed": 1, "temp": 0.8, "mtp": "on", "mtp_depth": depth}
        results = batch_generate(model, processor, ["What is 34 + 58?", "Who are you?"], **options)
        assert all(result.mtp.drafted for result in results)
        return [result.tokens for result in results]

    fused, plain = both(run, nano(mx.float32, tokens))
    assert fused == plain


@runs("dtype", [(dtype,) for dtype in DTYPES], [(mx.float16,)])
def test_logits_of_nano_are_close_with_kernels_and_with_operations(run: Run, dtype):
    def logits(model, _) -> mx.array:
        cache = model.make_cache(2)
        prompt = model(mx.arange(2 * 21).reshape(2, 21) + 100, cache)
        return mx.concatenate([prompt, model(mx.array([[7], [8]]), cache)], axis=1).astype(mx.float32)

    fused, plain = both(run, nano(dtype, logits))
    assert mx.abs(fused - plain).max().item() <= CLOSE[dtype] * mx.abs(plain).max().item()
