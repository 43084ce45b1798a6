"""The core of a Gated DeltaNet layer as one launch of gated_delta.metal; gated_delta.py holds the definition.

`delta_core` chooses between the two: the kernel runs on a GPU, once `self_check` has seen it agree there with the
operations on a small case of the same geometry and dtype.

Letters as there: B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head sizes, C = 2 Hk Dk + Hv Dv channels, K taps.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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

THREADS = 512  # of a threadgroup at most: with more a thread has too few registers for its part of the state
MEMORY = 32 << 10  # bytes of threadgroup memory at most
SIMD = 32
STAGED = 16  # tokens at a time where there is more than one


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
    """How the threads of a threadgroup share the state of a head. No choice but `parts` shows in the results' bits."""

    lanes: int  # threads that share a row
    rows: int  # rows that a thread has a share of
    parts: int  # sums that the product of a row is put together from: of Dk only
    staged: int  # tokens whose q, k, v lie in threadgroup memory at a time

    def threads(self, heads: Heads) -> int:
        return heads.Dv // self.rows * self.lanes

    def memory(self, heads: Heads) -> int:
        """Bytes of threadgroup memory: q, k, v of the staged tokens, five scalars each, and the conv taps for many."""
        numbers = 2 * heads.Dk + heads.Dv
        return 4 * (self.staged * (numbers + 5) + (heads.K * numbers if self.staged > 1 else 4))


def launch_plan(heads: Heads, T: int, lanes: int | None = None, staged: int | None = None) -> LaunchPlan | None:
    """The plan for T tokens, or None where this geometry does not fit; `lanes` and `staged` override the choice.

    One token: 4 lanes a row, the fewest exchanges between lanes. More: 8 lanes with two rows each, which halves what
    is read from threadgroup memory.
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
    snapshots: bool = False,
    lanes: int | None = None,
    staged: int | None = None,
) -> tuple[mx.array, DeltaState]:
    """Run the core over T tokens and return (B, T, Hv Dv) in the dtype of the projections, and the new state.

    Args:
        projected: the tokens, whole: [q k v z b a] (B, T, C + Hv Dv + 2 Hv), or [q k v z] (B, T, C + Hv Dv) and
            [b a] (B, T, 2 Hv). A slice of a larger array would be copied. conv_state has the first's dtype.
        lengths: (B,) int32. The first lengths[i] tokens of row i count, the rest is padding: it changes no state,
            and its output is 0. None: no padding.
        snapshots: return the state after each token: conv_state (B, T, K - 1, C), recurrent_state (B, T, Hv, Dv, Dk).
            Padding repeats the last.
        lanes, staged: see `plan`, which must not be None.
    """
    B, T, _ = projected[0].shape
    heads = Heads.of(weights.conv, state.recurrent_state)
    chosen = launch_plan(heads, T, lanes, staged)
    assert chosen is not None, f"no plan for {heads}"
    assert state.conv_state.dtype == projected[0].dtype, "conv_state has the dtype of the projected tokens"
    width = projected[0].shape[-1]
    assert width == heads.C + heads.Hv * heads.Dv + (2 * heads.Hv if len(projected) == 1 else 0), f"{width} for {heads}"
    inputs: dict[str, mx.array | int | float] = {
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
    }
    P = T if snapshots else 1
    outputs = {
        "y": ((B, T, heads.Hv * heads.Dv), projected[0].dtype),
        "new_window": ((B, P, *state.conv_state.shape[1:]), projected[0].dtype),
        "new_state": ((B, P, *state.recurrent_state.shape[1:]), mx.float32),
    }
    template = {
        "Element": projected[0].dtype,
        "ALIGNED": width % 4 == 0,  # so that four channels of any token can be read at once
        "GATES_APART": len(projected) == 2,
        "SNAPSHOTS": snapshots,
        **_constants(heads, chosen),
    }
    threads = chosen.threads(heads)
    grid, threadgroup = (threads, heads.Hv, B), (threads, 1, 1)
    y, conv_state, recurrent_state = fused.launch("gated_delta", inputs, outputs, template, grid, threadgroup)
    after = DeltaState(conv_state, recurrent_state)
    return y, after if snapshots else DeltaState(*(array.squeeze(1) for array in after))


def _constants(heads: Heads, chosen: LaunchPlan) -> dict[str, Any]:
    return {
        "KEY_HEADS": heads.Hk,
        "VALUE_HEADS": heads.Hv,
        "KEY_DIM": heads.Dk,
        "VALUE_DIM": heads.Dv,
        "TAPS": heads.K,
        "LANES": chosen.lanes,
        "ROWS": chosen.rows,
        "PARTS": chosen.parts,
        "STAGED": chosen.staged,
    }


# --- the choice ------------------------------------------------------------------------------------------------------


def delta_core(
    projected: Sequence[mx.array],
    split: Callable[[Sequence[mx.array]], Sequence[mx.array]],
    weights: DeltaWeights,
    state: DeltaState,
    lengths: mx.array | None = None,
    snapshots: bool = False,
) -> tuple[mx.array, DeltaState]:
    """Projections to gated output: by the kernel where it is enabled, else by operations.

    projected: the products of the projections as they come; `split` makes q k v, z, b, a of them. snapshots: return the
    state after each token, see fused_gated_delta.
    """
    heads = Heads.of(weights.conv, state.recurrent_state)
    widths = [array.shape[-1] for array in projected]
    if backend().fused_kernels and fits(widths, heads) and self_check(heads, projected[0].dtype):
        return fused_gated_delta(projected, weights, state, lengths, snapshots)
    core = stepwise_gated_delta if snapshots else gated_delta
    return core(*split(projected), weights, state, lengths)


def fits(widths: Sequence[int], heads: Heads) -> bool:
    """Whether products of these widths are [q k v z b a], or [q k v z] and [b a]."""
    qkvz, ba = heads.C + heads.Hv * heads.Dv, 2 * heads.Hv
    return list(widths) in ([qkvz + ba], [qkvz, ba])


@functools.cache
def self_check(heads: Heads, dtype: mx.Dtype) -> bool:
    """Whether the kernel agrees with the operations on this machine; if not, a warning says so, once.

    Called at load, so that a kernel that the machine's compiler refuses, or that computes something else, costs a
    warning and speed and never an answer.
    """
    return fused.agrees("gated_delta", lambda: _cases(heads, dtype))


def _cases(heads: Heads, dtype: mx.Dtype) -> Iterator[fused.Case]:
    """A prompt of 19 tokens and one token after it, beside the definition's answer, within what rounding explains.

    The definition has no matrix product, whose digits would be the machine's choice. Then the 20 tokens read at once,
    and the states after each of the last two, which must have the same bits.
    """
    if launch_plan(heads, 1) is None or launch_plan(heads, 2) is None:
        raise ValueError(f"it has no plan for {heads}")
    key = mx.random.key(0)
    draws = iter(mx.random.split(key, 8))
    normal = functools.partial(mx.random.normal, stream=mx.cpu)
    width = heads.C + heads.Hv * (heads.Dv + 2)
    tokens = normal((1, 20, width), key=next(draws)).astype(dtype)
    weights = DeltaWeights(
        normal((heads.K, heads.C), key=next(draws)) / 2, normal((heads.Hv,), key=next(draws)) - 1,
        normal((heads.Hv,), key=next(draws)) - 2, 1 + normal((heads.Dv,), key=next(draws)) / 10, 1e-6,
    )  # fmt: skip
    recurrent = normal((1, heads.Hv, heads.Dv, heads.Dk), key=next(draws)) / 10
    start = state = other = DeltaState(normal((1, heads.K - 1, heads.C), key=next(draws)).astype(dtype), recurrent)
    cuts = [heads.C, heads.C + heads.Hv * heads.Dv, heads.C + heads.Hv * (heads.Dv + 1)]
    step = {mx.float32: 1e-4, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]
    states = []
    for part in (tokens[:, :19], tokens[:, 19:]):
        ours, state = fused_gated_delta([part], weights, state)
        plain, other = gated_delta(*mx.split(part, cuts, axis=-1), weights, other, rule=sequential_rule)
        yield "output", ours, plain, fused.relative(step, plain)
        near = fused.relative(1e-4, other.recurrent_state)
        yield "recurrent_state", state.recurrent_state, other.recurrent_state, near
        yield "conv_state", state.conv_state, other.conv_state, 0.0
        states.append(state)
    _, whole = fused_gated_delta([tokens], weights, start)
    _, each = fused_gated_delta([tokens], weights, start, snapshots=True)
    for name, at_once, in_parts in zip(DeltaState._fields, whole, state, strict=True):
        yield f"{name} of tokens read at once", at_once, in_parts, 0.0
    for t, alone in zip((18, 19), states, strict=True):
        for name, among, last in zip(DeltaState._fields, each, alone, strict=True):
            yield f"{name} after token {t} among others", among[:, t], last, 0.0
