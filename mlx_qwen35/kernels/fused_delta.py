"""The core of a Gated DeltaNet layer as one launch of gated_delta.metal. gated_delta.py holds the definition.

`delta_core` chooses between the two: the kernel runs on a GPU, if it agrees with the definition on a small case of the
same geometry and dtype (`self_check`).

Letters as in gated_delta.py: B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head sizes, C = 2 Hk Dk + Hv Dv channels,
K taps.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import fused
from mlx_qwen35.kernels.gated_delta import (
    DeltaState,
    DeltaWeights,
    gated_delta,
    sequential_rule,
    stepwise_gated_delta,
)
from mlx_qwen35.kernels.gated_delta_backward import differentiable_rule

THREADS = 512  # the most of a threadgroup: with more, a thread has too few registers for its part of the state
MEMORY = 32 << 10  # the most bytes of threadgroup memory
SIMD = 32
STAGED = 16  # tokens staged at a time in a call of several


@dataclass(frozen=True)
class Heads:
    """The geometry of a layer's core."""

    Hk: int
    Hv: int
    Dk: int
    Dv: int
    K: int  # conv taps

    @property
    def C(self) -> int:
        return 2 * self.Hk * self.Dk + self.Hv * self.Dv

    @classmethod
    def of(cls, conv: mx.array, state: mx.array) -> "Heads":
        """From conv (K, C) and state (B, Hv, Dv, Dk)."""
        (K, C), (_, Hv, Dv, Dk) = conv.shape, state.shape
        return cls((C - Hv * Dv) // (2 * Dk), Hv, Dk, Dv, K)


@dataclass(frozen=True)
class LaunchPlan:
    """How the threads of a threadgroup share the state of a head. Of the choices only `parts` affects the bits."""

    lanes: int  # threads that share a row
    rows: int  # rows that a thread has a share of
    parts: int  # partial sums of a row's product, set by Dk alone
    staged: int  # tokens whose q, k, v lie in threadgroup memory at a time

    def threads(self, heads: Heads) -> int:
        return heads.Dv // self.rows * self.lanes

    def memory(self, heads: Heads) -> int:
        """Bytes of threadgroup memory: q, k, v and five scalars of each staged token, and the conv taps if several."""
        numbers = 2 * heads.Dk + heads.Dv
        return 4 * (self.staged * (numbers + 5) + (heads.K * numbers if self.staged > 1 else 4))


def launch_plan(heads: Heads, T: int, lanes: int | None = None, staged: int | None = None) -> LaunchPlan | None:
    """The plan for T tokens; None for a geometry that does not fit. `lanes` and `staged` override the choice.

    One token takes 4 lanes a row, which exchange least. Several take 8 lanes with two rows each, which halves the reads
    from threadgroup memory.
    """
    parts = next((parts for parts in (8, 4, 2, 1) if heads.Dk % (4 * parts) == 0), 0)
    if not parts or heads.Dv % 4 or heads.K < 2:
        return None
    first = (4, 8, 2, 1) if T == 1 else (8, 4, 2, 1)
    choice = [lanes for lanes in first if lanes <= parts] if lanes is None else [min(lanes, parts)]
    for lanes, rows in itertools.product(choice, (1, 2, 4, 8)):
        made = LaunchPlan(lanes, rows, parts, staged or (1 if T == 1 else STAGED))
        if heads.Dv % rows == 0 and made.threads(heads) % SIMD == 0 and made.threads(heads) <= THREADS:
            while made.memory(heads) > MEMORY and made.staged > 1:
                made = replace(made, staged=made.staged // 2)
            return made if made.memory(heads) <= MEMORY else None
    return None


def fused_gated_delta(
    projected: Sequence[mx.array],
    weights: DeltaWeights,
    state: DeltaState,
    lengths: mx.array | None = None,
    stepwise: bool = False,
    lanes: int | None = None,
    staged: int | None = None,
) -> tuple[mx.array, DeltaState]:
    """Run the kernel over T tokens and return (B, T, Hv Dv) in the dtype of the projections, and the new state.

    Args:
        projected: the tokens, whole: [q k v z b a] (B, T, C + Hv Dv + 2 Hv), or [q k v z] (B, T, C + Hv Dv) and
            [b a] (B, T, 2 Hv). A slice of a larger array would be copied. conv_state has the first's dtype.
        lengths: (B,) int32. The first lengths[i] tokens of row i count, the rest is padding: it changes no state,
            and its output is 0. None: no padding.
        stepwise: return the state after each token: conv_state (B, T, K - 1, C), recurrent_state (B, T, Hv, Dv, Dk).
            Padding repeats the last.
        lanes, staged: see `launch_plan`, which must not be None.
    """
    B, T, width = projected[0].shape
    heads = Heads.of(weights.conv, state.recurrent_state)
    plan = launch_plan(heads, T, lanes, staged)
    assert plan is not None, f"no plan for {heads}"
    assert fits([array.shape[-1] for array in projected], heads), f"{width} for {heads}"
    assert state.conv_state.dtype == projected[0].dtype, "conv_state has the dtype of the projected tokens"
    states, threads = T if stepwise else 1, plan.threads(heads)
    y, *after = fused.launch(
        "gated_delta",
        inputs={
            "projected": projected[0],
            "gates": projected[-1],
            "window": state.conv_state,
            "conv": weights.conv,
            "A_log": weights.A_log,
            "dt_bias": weights.dt_bias,
            "norm": weights.norm,
            "state": state.recurrent_state,
            "lengths": mx.array([T] * B, mx.int32) if lengths is None else lengths,  # from the host: no launch
            "tokens": T,
            "epsilon": weights.eps,
        },
        outputs={
            "y": ((B, T, heads.Hv * heads.Dv), projected[0].dtype),
            "new_window": ((B, states, *state.conv_state.shape[1:]), projected[0].dtype),
            "new_state": ((B, states, *state.recurrent_state.shape[1:]), mx.float32),
        },
        template={
            "Element": projected[0].dtype,
            "ALIGNED": width % 4 == 0,  # so that four channels of any token can be read at once
            "GATES_APART": len(projected) == 2,
            "SNAPSHOTS": stepwise,
            "KEY_HEADS": heads.Hk,
            "VALUE_HEADS": heads.Hv,
            "KEY_DIM": heads.Dk,
            "VALUE_DIM": heads.Dv,
            "TAPS": heads.K,
            "LANES": plan.lanes,
            "ROWS": plan.rows,
            "PARTS": plan.parts,
            "STAGED": plan.staged,
        },
        grid=(threads, heads.Hv, B),
        threadgroup=(threads, 1, 1),
    )
    return y, DeltaState(*(after if stepwise else (array.squeeze(1) for array in after)))


# --- the choice ------------------------------------------------------------------------------------------------------


def delta_core(
    projected: Sequence[mx.array],
    split: Callable[[Sequence[mx.array]], Sequence[mx.array]],
    weights: DeltaWeights,
    state: DeltaState,
    lengths: mx.array | None = None,
    stepwise: bool = False,
) -> tuple[mx.array, DeltaState]:
    """Projections to gated output, by the kernel where it is enabled, else by operations.

    projected: the products of the projections; `split` makes q k v, z, b, a of them. stepwise: return the state after
    each token, see `fused_gated_delta`.
    """
    heads = Heads.of(weights.conv, state.recurrent_state)
    widths = [array.shape[-1] for array in projected]
    if backend().fused_kernels and fits(widths, heads) and self_check(heads, projected[0].dtype):
        return fused_gated_delta(projected, weights, state, lengths, stepwise)
    if stepwise:
        return stepwise_gated_delta(split(projected), weights, state, lengths)
    qkv, z, b, a = split(projected)
    rule = differentiable_rule if backend().differentiates else None
    return gated_delta(qkv, z, b, a, weights, state, lengths, rule)


def fits(widths: Sequence[int], heads: Heads) -> bool:
    """Whether products of these widths are [q k v z b a], or [q k v z] and [b a]."""
    qkvz, ba = heads.C + heads.Hv * heads.Dv, 2 * heads.Hv
    return list(widths) in ([qkvz + ba], [qkvz, ba])


@functools.cache
def self_check(heads: Heads, dtype: mx.Dtype) -> bool:
    """Whether the kernel agrees with its definition on this machine. Warns once if it does not."""
    return fused.agrees("gated_delta", lambda: _cases(heads, dtype))


def _cases(heads: Heads, dtype: mx.Dtype) -> Iterator[fused.Case]:
    """A prompt of 19 tokens and one token more, against `sequential_rule`, which has sums and no matrix products.

    Then all 20 tokens in one call, and the states after each of the last two: these must have the same bits.
    """
    if launch_plan(heads, 1) is None or launch_plan(heads, 2) is None:
        raise ValueError(f"it has no plan for {heads}")
    Hv, values = heads.Hv, heads.C + heads.Hv * heads.Dv
    tokens, conv, A_log, dt_bias, norm, recurrent_state, conv_state = fused.normal_arrays(
        (1, 20, values + 2 * Hv), (heads.K, heads.C), (Hv,), (Hv,), (heads.Dv,), (1, Hv, heads.Dv, heads.Dk),
        (1, heads.K - 1, heads.C),
    )  # fmt: skip
    tokens = tokens.astype(dtype)
    weights = DeltaWeights(conv / 2, A_log - 1, dt_bias - 2, 1 + norm / 10, 1e-6)
    start = state = defined = DeltaState(conv_state.astype(dtype), recurrent_state / 10)
    states = []
    for part in (tokens[:, :19], tokens[:, 19:]):
        out, state = fused_gated_delta([part], weights, state)
        qkv, z, b, a = mx.split(part, [heads.C, values, values + Hv], axis=-1)
        plain, defined = gated_delta(qkv, z, b, a, weights, defined, rule=sequential_rule)
        near = fused.relative(1e-4, defined.recurrent_state)
        yield "output", out, plain, fused.relative(max(1e-4, fused.ROUNDING[dtype]), plain)
        yield "recurrent_state", state.recurrent_state, defined.recurrent_state, near
        yield "conv_state", state.conv_state, defined.conv_state, 0.0
        states.append(state)
    _, at_once = fused_gated_delta([tokens], weights, start)
    _, steps = fused_gated_delta([tokens], weights, start, stepwise=True)
    for i, name in enumerate(DeltaState._fields):
        yield f"{name} of 20 tokens in one call", at_once[i], state[i], 0.0
        for t, alone in zip((18, 19), states, strict=True):
            yield f"{name} after token {t} of 20", steps[i][:, t], alone[i], 0.0
