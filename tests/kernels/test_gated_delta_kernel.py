"""The fused DeltaNet core, run by the emulator, gives the operations' answer and the definition's.

And the bits of a token do not depend on how it is read: in a long call, a short one, alone, beside padding.
"""

import itertools
from dataclasses import replace

import mlx.core as mx
import pytest
from kernels.delta_cases import DIFFERENT, DTYPES, KINDS, ODD, REAL, WHOLE, Case, case, definition, differences, same
from kernels.emulator import emulate, missing

from mlx_qwen35.kernels.fused_delta import MEMORY, THREADS, Heads, fused_gated_delta, launch_plan
from mlx_qwen35.kernels.gated_delta import DeltaState

emulated = pytest.mark.skipif(bool(missing()), reason=missing())
LENGTHS = (1, 2, 3, 16, 17, 63, 130, pytest.param(400, marks=pytest.mark.full))


def run(case: Case, lengths: list[int] | None = None, order="forward", **options):
    """Output, window, state of the kernel."""
    return emulate(lambda: case.launch(lengths, **options), order=order)[0]


def assert_close(out, want, state, want_state) -> None:
    found = differences(out, want, state, want_state)
    assert not found, found


# --- the answer ------------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gives_what_the_operations_give_for_rows_of_different_lengths(dtype, T):
    given, lengths = case(DIFFERENT, T, dtype, B=3), [T, 0, T // 2]
    out, window, state = run(given, lengths)
    want, want_window, want_state = given.plain(lengths)
    assert_close(out, want, state, want_state)
    assert same([window], [want_window])


@emulated
@pytest.mark.full
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [DIFFERENT, REAL], ids=["different", "real"])
def test_kernel_gives_what_the_operations_give_in_any_batch_and_the_same_bits_in_both_orders_of_lanes(heads, dtype, T):
    for B in (1, 3):
        given = case(heads, T, dtype, B)
        out, window, state = run(given)
        want, want_window, want_state = given.plain()
        assert_close(out, want, state, want_state)
        assert same([window], [want_window])
        assert same(run(given, order="backward"), [out, window, state])


@emulated
@pytest.mark.parametrize("T", [1, 130])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_gives_what_the_definition_gives_in_float64(kind, T):
    given = case(REAL, T, mx.float32, kind=kind)
    out, _, state = run(given)
    assert_close(out, definition(given)[0], state, definition(given)[1])


@emulated
@pytest.mark.parametrize("T", [1, 17])
def test_kernel_of_all_heads_of_the_4b_gives_what_the_definition_gives(T):
    given = case(WHOLE, T, mx.float32)
    out, _, state = run(given)
    assert_close(out, definition(given)[0], state, definition(given)[1])


@emulated
@pytest.mark.full
@pytest.mark.parametrize("heads", [Heads(1, r, Dk, 160 - Dk, 3 + r % 2) for r in (2, 5) for Dk in (32, 64, 96, 128)])
def test_kernel_of_other_sizes_gives_what_the_definition_gives(heads):
    for T, dtype in itertools.product((1, 21), DTYPES):
        given = case(heads, T, dtype, B=2)
        out, _, state = run(given)
        assert_close(out, definition(given)[0], state, definition(given)[1])


@emulated
@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_of_the_real_sizes_gives_what_the_definition_gives_after_400_tokens(dtype, kind):
    given = case(REAL, 400, dtype, kind=kind)
    out, _, state = run(given)
    assert_close(out, definition(given)[0], state, definition(given)[1])


@emulated
def test_epsilons_count_where_everything_is_small():
    given = case(REAL, 17, mx.float32).small()
    out, _, state = run(given)
    assert_close(out * 1e2, definition(given)[0] * 1e2, state * 1e3, definition(given)[1] * 1e3)


# --- the same bits ---------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("cuts", [(5, 6, 22, 39), tuple(range(1, 40))], ids=["parts", "tokens"])
@pytest.mark.parametrize("heads", [ODD, pytest.param(REAL, marks=pytest.mark.full)], ids=["odd", "real"])
def test_a_text_read_in_calls_gives_the_bits_of_one_call(heads, cuts):
    given, outputs = case(heads, 40, mx.float16, B=2), []
    want = run(given)
    for start, stop in itertools.pairwise((0, *cuts, 40)):
        out, *memory = run(replace(given, projected=given.projected[:, start:stop]))
        given = replace(given, memory=DeltaState(*memory))
        outputs.append(out)
    assert same([mx.concatenate(outputs, axis=1), *memory], want)


@emulated
@pytest.mark.parametrize("lanes", [2, 4, 8])
@pytest.mark.parametrize("staged", [1, 16])
def test_neither_lanes_nor_staged_tokens_change_a_bit(staged, lanes):
    given = case(ODD, 19, mx.float16)
    assert same(run(given, lanes=lanes, staged=staged), run(given))


@emulated
@pytest.mark.parametrize("T", [1, 33])
def test_lanes_in_backward_order_give_the_same_bits(T):
    given = case(ODD, T, mx.float16, B=2)
    assert same(run(given, [T, T // 2], order="backward"), run(given, [T, T // 2]))


@emulated
def test_gates_in_an_array_of_their_own_change_no_bit():
    given = case(ODD, 19, mx.float16, B=2)
    assert same(run(given, apart=True), run(given))


@emulated
def test_memory_after_each_token_is_that_of_the_text_up_to_there():
    given = case(ODD, 20, mx.float16, B=2)
    out, windows, states = run(given, [20, 7], stepwise=True)
    assert same([out], run(given, [20, 7])[:1])
    for t in range(20):
        _, window, state = run(replace(given, projected=given.projected[:, : t + 1]), [t + 1, min(t + 1, 7)])
        assert same([windows[:, t], states[:, t]], [window, state])


@emulated
@pytest.mark.parametrize("T", [1, 2, 3, 37])
def test_padding_changes_no_bit_and_gives_zeros(T):
    given, lengths = case(ODD, T, mx.float16, B=3), [T - 1, 0, T]
    real = (mx.arange(T) < mx.array(lengths)[:, None])[..., None]
    spoiled = replace(given, projected=mx.where(real, given.projected, mx.nan).astype(mx.float16))
    out, window, state = run(spoiled, lengths)
    assert not mx.where(real, 0, out).any().item()
    for row, length in enumerate(lengths):
        b = slice(row, row + 1)
        alone = given.rows(b, slice(length))
        want = run(alone) if length else (out[:0, :0], *alone.memory)
        assert same([window[b], state[b]], want[1:])
        assert not length or same([out[b, :length]], want[:1])


# --- the plan, the traffic -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 500])
def test_every_geometry_of_the_tests_has_a_plan_within_the_limits(T):
    for r, Dk, Dv, K in itertools.product((1, 2, 3, 5), *[(32, 48, 64, 96, 128)] * 2, (3, 4)):
        heads = Heads(2, 2 * r, Dk, Dv, K)
        made = launch_plan(heads, T)
        assert made.threads(heads) <= THREADS and made.threads(heads) % 32 == 0
        assert made.memory(heads) <= MEMORY and made.staged == (1 if T == 1 else 16)
        assert Dk % (4 * made.parts) == 0 == made.parts % made.lanes and made.parts == launch_plan(heads, 1).parts


def test_a_geometry_that_does_not_fit_has_no_plan():
    for sizes, T in itertools.product(((30, 64, 4), (64, 30, 4), (64, 64, 1), (64, 8192, 4)), (1, 2)):
        assert launch_plan(Heads(1, 1, *sizes), T) is None


def test_a_geometry_has_a_plan_for_one_token_if_for_many():
    for Dv, Dk in itertools.product(range(4, 132, 4), repeat=2):
        heads = Heads(1, 1, Dk, Dv, 4)
        assert (launch_plan(heads, 1) is None) == (launch_plan(heads, 2) is None)


def test_larger_heads_have_fewer_tokens_staged():
    made = launch_plan(Heads(1, 1, 256, 128, 4), 2)
    assert made.staged == 8 and made.memory(Heads(1, 1, 256, 128, 4)) <= MEMORY


def policed(heads: Heads, T: int, B: int, **options):
    given = case(heads, T, mx.bfloat16, B)
    lengths = mx.array([T, T // 2][:B], mx.int32)
    call = ([given.projected], given.weights, given.memory, lengths)
    _, report = emulate(lambda: fused_gated_delta(*call, **options), police=True)
    assert not report.faults
    return report.launches[0]


@emulated
@pytest.mark.parametrize("T", [1, 35])
@pytest.mark.parametrize("stepwise", [False, True])
def test_police_finds_nothing(stepwise, T):
    policed(ODD, T, B=2, stepwise=stepwise)


@emulated
def test_one_token_takes_2_barriers_2_kilobytes_of_threadgroup_memory_and_2_and_a_half_megabytes_read():
    launch = policed(WHOLE, 1, 1)
    assert (launch.threadgroups, launch.barriers, launch.collectives) == (32, 2 * 32, 3200)
    assert launch.threadgroup_memory == 1584
    assert (launch.device().read, launch.device().written) == (2_466_176, 2_154_496)  # 2,097,152 of each is state
    assert (launch.device().unique_read, launch.device().unique_written) == (2_302_848, 2_154_496)
    assert (launch.threadgroup_read, launch.threadgroup_written) == (4_653_056, 66_176)


@emulated
def test_many_tokens_take_31_kilobytes_of_threadgroup_memory_and_less_than_a_quarter_of_a_megabyte_each():
    launch = policed(WHOLE, 32, 1)
    traffic = launch.device("state", "new_state")
    assert (launch.threadgroups, launch.barriers, launch.collectives) == (32, 32 * (1 + 2 * 2), 32 * 7808)
    assert launch.threadgroup_memory == launch_plan(WHOLE, 32).memory(WHOLE) == 31_040
    assert (traffic.read, traffic.written) == (4_190_208, 311_296)  # 140,672 a token
    assert (traffic.unique_read, traffic.unique_written) == (971_520, 311_296)
    assert (launch.threadgroup_read, launch.threadgroup_written) == (32 * 2_818_048, 32 * 72_320)
