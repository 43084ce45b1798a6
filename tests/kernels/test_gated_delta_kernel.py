"""The fused DeltaNet core, run by the emulator, gives the operations' answer and the definition's.

And the bits of a token do not depend on how it is read: in a long call, a short one, alone, beside padding.
"""

import itertools
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from kernels.emulator import emulate, missing

from mlx_qwen35.kernels.fused_delta import MEMORY, THREADS, Heads, fused_gated_delta, plan
from mlx_qwen35.kernels.gated_delta import DeltaState, DeltaWeights, gated_delta

emulated = pytest.mark.skipif(bool(missing()), reason=missing())
EPS = 1e-6
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
STEP = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}  # from 1 to the next number
LENGTHS = (1, 2, 3, 16, 17, 63, 130)
KINDS = ("random", "correlated", "slow", "fast", "fading")

DIFFERENT = Heads(Hk=2, Hv=6, Dk=48, Dv=96, K=3)
REAL = Heads(Hk=1, Hv=2, Dk=128, Dv=128, K=4)  # one group of the heads of every published model but the largest
ODD = Heads(Hk=1, Hv=3, Dk=64, Dv=32, K=4)  # 3 + 3 gates: tokens begin at no multiple of 4 numbers
WHOLE = Heads(Hk=16, Hv=32, Dk=128, Dv=128, K=4)  # 4B


@dataclass(frozen=True)
class Case:
    """One call: projections (B, T, [q k v z b a]), weights, memory."""

    heads: Heads
    projected: mx.array
    weights: DeltaWeights
    memory: DeltaState

    def parts(self) -> list[mx.array]:
        """q k v, z, b, a."""
        h = self.heads
        return mx.split(self.projected, [h.C, h.C + h.Hv * h.Dv, h.C + h.Hv * (h.Dv + 1)], axis=-1)

    def rows(self, b: slice, t: slice) -> "Case":
        memory = DeltaState(self.memory.window[b], self.memory.state[b])
        return replace(self, projected=self.projected[b, t], memory=memory)


def case(heads: Heads, T: int, dtype: mx.Dtype, B: int = 1, kind: str = "random") -> Case:
    rng = np.random.default_rng(T + B)
    C, Hv = heads.C, heads.Hv

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    tokens, b, a, A_log = draw(B, heads.K - 1 + T, C + Hv * heads.Dv), draw(B, T, Hv), draw(B, T, Hv), draw(Hv)
    if kind == "correlated":  # nearly the same keys again and again, written strongly, hardly forgotten
        tokens = draw(1, 1, tokens.shape[-1]) + 0.02 * tokens
        b, a = b * 0.1 + 2.2, a - 9
    if kind == "slow":
        a, A_log = a - 12, A_log + 2
    if kind == "fast":
        a, A_log = a + 3, A_log + 1
    if kind == "fading":  # the state of before, by the same 0.0001 at each token: an error would add up
        b, a, A_log = b * 0 - 60, a * 0 - 13, A_log * 0 + 4
    window, tokens = tokens[:, : heads.K - 1, :C], tokens[:, heads.K - 1 :]
    projected = mx.array(np.concatenate([tokens, b, a], axis=-1)).astype(dtype)
    small = [draw(heads.K, C), A_log, 0.1 * draw(Hv), 1 + 0.1 * draw(heads.Dv)]
    weights = DeltaWeights(*(mx.array(x) for x in small), EPS)
    state = 0.3 * draw(B, Hv, heads.Dv, heads.Dk)
    return Case(heads, projected, weights, DeltaState(mx.array(window).astype(dtype), mx.array(state)))


def run(case: Case, lengths: list[int] | None = None, order="forward", apart: bool = False, **options):
    """Output, window, state of the kernel."""
    whole, cut = case.projected, case.heads.C + case.heads.Hv * case.heads.Dv
    projected = mx.split(whole, [cut], axis=-1) if apart else [whole]
    lengths = None if lengths is None else mx.array(lengths, mx.int32)
    call = (projected, case.weights, case.memory, lengths)
    (out, memory), _ = emulate(lambda: fused_gated_delta(*call, **options), order=order)
    return out, *memory


def same(ours, theirs) -> bool:
    """All arrays have the same bits."""
    return all(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)).item() for a, b in zip(ours, theirs, strict=True))


def definition(case: Case):
    """Output and state by the formulas, in float64, one token after the other."""
    h = case.heads
    qkv, z, b, a = (np.array(x.astype(mx.float32), np.float64) for x in case.parts())
    conv, A_log, dt_bias, norm = (np.array(x, np.float64) for x in case.weights[:4])
    tokens = np.concatenate([np.array(case.memory.window.astype(mx.float32), np.float64), qkv], axis=1)
    B, T, _ = qkv.shape
    mixed = sum(tokens[:, tap : tap + T] * conv[tap] for tap in range(h.K))
    q, k, v = np.split(mixed / (1 + np.exp(-mixed)), [h.Hk * h.Dk, 2 * h.Hk * h.Dk], axis=-1)
    q, k = (x.reshape(B, T, h.Hk, h.Dk).repeat(h.Hv // h.Hk, axis=2) for x in (q, k))
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    v, z = v.reshape(B, T, h.Hv, h.Dv), z.reshape(B, T, h.Hv, h.Dv)
    decay, beta = np.exp(-np.exp(A_log) * np.logaddexp(0, a + dt_bias)), 1 / (1 + np.exp(-b))
    S, out = np.array(case.memory.state, np.float64), np.zeros_like(v)
    for t in range(T):
        S = S * decay[:, t, :, None, None]
        change = beta[:, t, :, None] * (v[:, t] - np.einsum("bhvk,bhk->bhv", S, k[:, t]))
        S = S + change[..., None] * k[:, t, :, None]
        out[:, t] = np.einsum("bhvk,bhk->bhv", S, q[:, t]) * h.Dk**-0.5
    out = out / np.sqrt((out * out).mean(-1, keepdims=True) + EPS) * norm * z / (1 + np.exp(-z))
    return out.reshape(B, T, -1), S


def assert_close(out: mx.array, want, state: mx.array, want_state) -> None:
    """Up to half a step of the output's dtype, and what float32 loses on the way: a norm magnifies small outputs."""
    want = np.array(want.astype(mx.float32) if isinstance(want, mx.array) else want)
    error = np.abs(np.array(out.astype(mx.float32)) - want)
    assert (error <= 1e-4 + STEP[out.dtype] * np.abs(want)).all(), f"output: {np.nanmax(error):.1e}"
    error = np.abs(np.array(state) - np.array(want_state))
    assert (error <= 1e-5 * (1 + np.abs(want_state).max())).all(), f"state: {np.nanmax(error):.1e}"


# --- the answer ------------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gives_what_the_operations_give_for_rows_of_different_lengths(dtype, T):
    given, lengths = case(DIFFERENT, T, dtype, B=3), [T, 0, T // 2]
    out, window, state = run(given, lengths)
    want, memory = gated_delta(*given.parts(), given.weights, given.memory, mx.array(lengths, mx.int32))
    real = (mx.arange(T) < mx.array(lengths)[:, None])[..., None]
    assert_close(mx.where(real, out, 0), mx.where(real, want, 0), state, memory.state)
    assert same([window], [memory.window])


@emulated
@pytest.mark.parametrize("T", [1, 130])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_gives_what_the_definition_gives_in_float64(kind, T):
    given = case(REAL, T, mx.float32, kind=kind)
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
    given = case(REAL, 17, mx.float32)
    weights = given.weights._replace(conv=given.weights.conv * 1e-3)
    given = replace(given, weights=weights, memory=given.memory._replace(state=given.memory.state * 1e-3))
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
    out, windows, states = run(given, [20, 7], snapshots=True)
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
        made = plan(heads, T)
        assert made.threads(heads) <= THREADS and made.threads(heads) % 32 == 0
        assert made.memory(heads) <= MEMORY and made.staged == (1 if T == 1 else 16)
        assert Dk % (4 * made.parts) == 0 == made.parts % made.lanes and made.parts == plan(heads, 1).parts


def test_a_geometry_that_does_not_fit_has_no_plan():
    for sizes, T in itertools.product(((30, 64, 4), (64, 30, 4), (64, 64, 1), (64, 8192, 4)), (1, 2)):
        assert plan(Heads(1, 1, *sizes), T) is None


def test_a_geometry_has_a_plan_for_one_token_if_for_many():
    for Dv, Dk in itertools.product(range(4, 132, 4), repeat=2):
        heads = Heads(1, 1, Dk, Dv, 4)
        assert (plan(heads, 1) is None) == (plan(heads, 2) is None)


def test_larger_heads_have_fewer_tokens_staged():
    made = plan(Heads(1, 1, 256, 128, 4), 2)
    assert made.staged == 8 and made.memory(Heads(1, 1, 256, 128, 4)) <= MEMORY


def policed(heads: Heads, T: int, B: int, **options):
    given = case(heads, T, mx.bfloat16, B)
    lengths = mx.array([T, T // 2][:B], mx.int32)
    call = ([given.projected], given.weights, given.memory, lengths)
    _, report = emulate(lambda: fused_gated_delta(*call, **options), police=True)
    assert not report.faults and not report.warnings
    return report.launches[0]


@emulated
@pytest.mark.parametrize("T", [1, 35])
@pytest.mark.parametrize("snapshots", [False, True])
def test_police_finds_nothing(snapshots, T):
    policed(ODD, T, B=2, snapshots=snapshots)


@emulated
def test_one_token_takes_2_barriers_2_kilobytes_of_threadgroup_memory_and_2_and_a_half_megabytes_read():
    launch = policed(WHOLE, 1, 1)
    assert (launch.threadgroups, launch.barriers, launch.collectives) == (32, 2 * 32, 2688)
    assert launch.threadgroup_memory == 1584
    assert (launch.device().read, launch.device().written) == (2_466_176, 2_154_496)  # 2,097,152 of each is state
    assert (launch.threadgroup_read, launch.threadgroup_written) == (4_653_056, 66_176)


@emulated
def test_many_tokens_take_31_kilobytes_of_threadgroup_memory_and_less_than_a_quarter_of_a_megabyte_each():
    launch = policed(WHOLE, 32, 1)
    traffic = launch.device("state", "new_state")
    assert (launch.threadgroups, launch.barriers, launch.collectives) == (32, 32 * (1 + 2 * 2), 32 * 6784)
    assert launch.threadgroup_memory == plan(WHOLE, 32).memory(WHOLE) == 31_040
    assert (traffic.read, traffic.written) == (4_190_208, 311_296)  # 140,672 a token
    assert (launch.threadgroup_read, launch.threadgroup_written) == (32 * 2_818_048, 32 * 72_320)
