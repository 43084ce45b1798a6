"""Cases of the DeltaNet core: projections, weights and memory, what the definition makes of them, how far is wrong."""

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.kernels.fused_delta import Heads, fused_gated_delta
from mlx_qwen35.kernels.gated_delta import DeltaState, DeltaWeights, gated_delta

EPS = 1e-6
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
STEP = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}  # from 1 to the next number
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
        memory = DeltaState(self.memory.conv_state[b], self.memory.recurrent_state[b])
        return replace(self, projected=self.projected[b, t], memory=memory)

    def small(self) -> "Case":
        """Convolved tokens and state a thousand times smaller: every epsilon counts."""
        weights = self.weights._replace(conv=self.weights.conv * 1e-3)
        small = self.memory._replace(recurrent_state=self.memory.recurrent_state * 1e-3)
        return replace(self, weights=weights, memory=small)

    def launch(self, lengths: list[int] | None = None, apart: bool = False, **options: Any) -> tuple[mx.array, ...]:
        """Output, window, state of the kernel; `apart`: b and a come in an array of their own."""
        cut = self.heads.C + self.heads.Hv * self.heads.Dv
        projected = mx.split(self.projected, [cut], axis=-1) if apart else [self.projected]
        out, memory = fused_gated_delta(projected, self.weights, self.memory, _array(lengths), **options)
        return out, *memory

    def one_by_one(self, lengths: list[int]) -> tuple[mx.array, ...]:
        """Output, and window and state after each token, (B, T, ...) all, by launches of one token."""
        steps, memory = [], self.memory
        for t in range(self.projected.shape[1]):
            token = replace(self, projected=self.projected[:, t : t + 1], memory=memory)
            out, *after = token.launch([int(n > t) for n in lengths])
            memory = DeltaState(*after)
            steps.append((out[:, 0], *memory))
        return tuple(mx.stack(each, axis=1) for each in zip(*steps, strict=True))

    def plain(self, lengths: list[int] | None = None) -> tuple[mx.array, ...]:
        """Output, window, state by operations; the output is 0 at padding, as the kernel gives it."""
        out, memory = gated_delta(*self.parts(), self.weights, self.memory, _array(lengths))
        B, T, _ = out.shape
        real = mx.arange(T) < mx.array([T] * B if lengths is None else lengths)[:, None]
        return mx.where(real[..., None], out, 0), *memory


def _array(lengths: list[int] | None) -> mx.array | None:
    return None if lengths is None else mx.array(lengths, mx.int32)


def case(heads: Heads, T: int, dtype: mx.Dtype, B: int = 1, kind: str = "random") -> Case:
    rng = np.random.default_rng(T + B)
    C, Hv = heads.C, heads.Hv

    def draw(*shape: int) -> np.ndarray:
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


def same(ours: Any, theirs: Any) -> bool:
    """All arrays have the same bits."""
    return all(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)).item() for a, b in zip(ours, theirs, strict=True))


def definition(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Output and state by the formulas, in float64, one token after the other."""
    h = case.heads
    qkv, z, b, a = (np.array(x.astype(mx.float32), np.float64) for x in case.parts())
    conv, A_log, dt_bias, norm = (np.array(x, np.float64) for x in case.weights[:4])
    tokens = np.concatenate([np.array(case.memory.conv_state.astype(mx.float32), np.float64), qkv], axis=1)
    B, T, _ = qkv.shape
    mixed = sum(tokens[:, tap : tap + T] * conv[tap] for tap in range(h.K))
    q, k, v = np.split(mixed / (1 + np.exp(-mixed)), [h.Hk * h.Dk, 2 * h.Hk * h.Dk], axis=-1)
    q, k = (x.reshape(B, T, h.Hk, h.Dk).repeat(h.Hv // h.Hk, axis=2) for x in (q, k))
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    v, z = v.reshape(B, T, h.Hv, h.Dv), z.reshape(B, T, h.Hv, h.Dv)
    decay, beta = np.exp(-np.exp(A_log) * np.logaddexp(0, a + dt_bias)), 1 / (1 + np.exp(-b))
    S, out = np.array(case.memory.recurrent_state, np.float64), np.zeros_like(v)
    for t in range(T):
        S = S * decay[:, t, :, None, None]
        change = beta[:, t, :, None] * (v[:, t] - np.einsum("bhvk,bhk->bhv", S, k[:, t]))
        S = S + change[..., None] * k[:, t, :, None]
        out[:, t] = np.einsum("bhvk,bhk->bhv", S, q[:, t]) * h.Dk**-0.5
    out = out / np.sqrt((out * out).mean(-1, keepdims=True) + EPS) * norm * z / (1 + np.exp(-z))
    return out.reshape(B, T, -1), S


def differences(out: mx.array, want: Any, state: mx.array, want_state: Any) -> list[str]:
    """Beyond half a step of the output's dtype, and what float32 loses on the way: a norm magnifies small outputs."""
    found = []
    want, want_state = _numbers(want), _numbers(want_state)
    error = np.abs(_numbers(out) - want)
    if not (error <= 1e-4 + STEP[out.dtype] * np.abs(want)).all():  # NaN too
        found.append(f"output differs by {error.max():.1e}")
    error = np.abs(_numbers(state) - want_state)
    if not (error <= 1e-5 * (1 + np.abs(want_state).max())).all():
        found.append(f"state differs by {error.max():.1e}")
    return found


def _numbers(array: Any) -> np.ndarray:
    return np.array(array.astype(mx.float32)) if isinstance(array, mx.array) else array
