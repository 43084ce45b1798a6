"""The core of a Gated DeltaNet layer: projections in, gated and normalised output out.

    causal conv + silu -> l2 norms of q, k -> gates -> gated delta rule -> RMSNorm gated by silu(z)

`gated_delta` composes it of MLX operations; fused_delta.py launches it as one kernel. The delta rule has three forms
that agree up to rounding: `sequential_rule` is the definition, `step_rule` one token of it for decoding, `chunked_rule`
the WY form for prompts. All compute in float32. The last two use matrix products, whose operands some machines shorten
(products.py); the definition uses sums alone.

Letters: B batch, T tokens, Hk/Hv key/value heads, r = Hv / Hk, Dk/Dv head sizes, C = 2 Hk Dk + Hv Dv channels,
K conv taps, L chunk length, N chunks. Value head h reads key head h // r.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels.by_hand import Arrays, by_hand
from mlx_qwen35.kernels.causal_conv import causal_conv
from mlx_qwen35.kernels.elementwise import exp, silu

L2_EPS = 1e-6  # added to the sum of squares, under the root (transformers, l2norm)
CHUNK = 32  # fastest on a CPU with a good BLAS; longer chunks also lose digits

Outputs = tuple[mx.array, mx.array]  # of a delta rule: (B, T, Hv, Dv), and the new recurrent state

class DeltaWeights(NamedTuple):
    """The small parameters of one layer, all float32."""

    conv: mx.array  # (K, C): tap K - 1 multiplies the newest token
    A_log: mx.array  # (Hv,)
    dt_bias: mx.array  # (Hv,)
    norm: mx.array  # (Dv,): plain gamma, no one to add
    eps: float  # of the gated RMSNorm


class DeltaState(NamedTuple):
    """The state of one DeltaNet layer, by transformers' names."""

    conv_state: mx.array  # (B, K - 1, C) the last projected tokens, before conv and silu, in the activation dtype
    recurrent_state: mx.array  # (B, Hv, Dv, Dk) float32


def gated_delta(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    weights: DeltaWeights,
    state: DeltaState,
    lengths: mx.array | None = None,
    rule: Callable[..., Outputs] | None = None,
) -> tuple[mx.array, DeltaState]:
    """Run the core over T tokens and return (B, T, Hv Dv) in qkv's dtype, and the new state.

    Args:
        qkv: (B, T, C) projected tokens, q then k then v, head-major.
        z: (B, T, Hv Dv) output gate before silu.
        b, a: (B, T, Hv) write strength before the sigmoid, and the input of the decay.
        lengths: (B,) int32. The first lengths[i] tokens of row i count, the rest is padding: it changes no state,
            and the outputs there mean nothing. None: no padding.
        rule: one of the three forms; None is the fastest for T.
    """
    B, T, _ = qkv.shape
    _, Hv, Dv, Dk = state.recurrent_state.shape
    valid = None if lengths is None else mx.arange(T) < lengths[:, None]
    if valid is not None:  # NaN of padding must not reach the tokens through a product
        qkv = mx.where(valid[..., None], qkv, mx.zeros((), qkv.dtype))
    tokens = mx.concatenate([state.conv_state, qkv], axis=1)
    conv_state = _last_tokens(tokens, state.conv_state.shape[1], lengths)
    q, k, v = _convolve(tokens.astype(mx.float32), weights.conv, T, (Hv, Dv, Dk))
    log_decay, beta = gates(b, a, weights, valid)
    rule = rule or (step_rule if T == 1 else chunked_rule)
    out, recurrent_state = rule(q, k, v, log_decay, beta, state.recurrent_state)
    z = z.astype(mx.float32).reshape(B, T, Hv, Dv)
    out = mx.fast.rms_norm(out, weights.norm, weights.eps) * silu(z)
    return out.reshape(B, T, Hv * Dv).astype(qkv.dtype), DeltaState(conv_state, recurrent_state)


def stepwise_gated_delta(
    projected: Sequence[mx.array], weights: DeltaWeights, state: DeltaState, lengths: mx.array | None = None
) -> tuple[mx.array, DeltaState]:
    """`gated_delta` of qkv, z, b, a token by token, with the states after each: (B, T, K - 1, C), (B, T, Hv, Dv, Dk).

    Outputs and states equal those of T single calls bit for bit. Padding repeats the last state.
    """
    outputs, states = [], []
    for t in range(projected[0].shape[1]):
        qkv, z, b, a = (array[:, t : t + 1] for array in projected)
        here = None if lengths is None else (lengths > t).astype(mx.int32)
        out, state = gated_delta(qkv, z, b, a, weights, state, here)
        outputs.append(out)
        states.append(state)
    steps = DeltaState(*(mx.stack(list(each), axis=1) for each in zip(*states, strict=True)))
    return mx.concatenate(outputs, axis=1), steps


def gates(b: mx.array, a: mx.array, weights: DeltaWeights, valid: mx.array | None) -> tuple[mx.array, mx.array]:
    """Each token's log decay, at most 0, and its write strength, 0 to 1; both (B, T, Hv) float32.

    log decay = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b) (transformers, Qwen3_5GatedDeltaNet). A padded
    token neither decays (0) nor writes (0).
    """
    log_decay = -mx.exp(weights.A_log) * mx.logaddexp(a.astype(mx.float32) + weights.dt_bias, 0.0)
    beta = mx.sigmoid(b.astype(mx.float32))
    if valid is None:
        return log_decay, beta
    return mx.where(valid[..., None], log_decay, 0.0), mx.where(valid[..., None], beta, 0.0)


def _last_tokens(tokens: mx.array, count: int, lengths: mx.array | None) -> mx.array:
    """The last `count` tokens, padding left out, of each row of (B, count + T, C): the next conv_state."""
    if lengths is None:
        last = tokens[:, -count:]
        # A slice of many tokens would keep all of them in memory for as long as the state is held.
        return last if tokens.shape[1] <= 2 * count else mx.concatenate([last, last[:, :0]], axis=1)
    return mx.take_along_axis(tokens, (lengths[:, None] + mx.arange(count))[..., None], axis=1)


def _convolve(tokens: mx.array, conv: mx.array, T: int, sizes: tuple[int, int, int]) -> tuple[mx.array, ...]:
    """Causal depthwise conv, silu, split, and l2 norms: q, k (B, T, Hk, Dk) and v (B, T, Hv, Dv)."""
    Hv, Dv, Dk = sizes
    mixed = causal_conv(tokens, conv)
    B, _, C = mixed.shape
    qk, v = mx.split(mixed, [C - Hv * Dv], axis=-1)
    qk = qk.reshape(B, T, 2, -1, Dk)
    qk = qk * mx.rsqrt((qk * qk).sum(-1, keepdims=True) + L2_EPS)
    return qk[:, :, 0] * Dk**-0.5, qk[:, :, 1], v.reshape(B, T, Hv, Dv)


# --- the gated delta rule in three forms -----------------------------------------------------------------------------
#
# Each takes q, k (B, T, Hk, Dk), v (B, T, Hv, Dv), log_decay and beta (B, T, Hv), state (B, Hv, Dv, Dk), all float32.


def sequential_rule(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array
) -> Outputs:
    """The definition, token by token: decay, predict, correct, then read (arXiv:2412.06464, eq. 10)."""
    repeat = v.shape[2] // k.shape[2]
    q, k = mx.repeat(q, repeat, axis=2), mx.repeat(k, repeat, axis=2)
    outputs = []
    for t in range(v.shape[1]):
        state = state * mx.exp(log_decay[:, t])[..., None, None]
        predicted = (state * k[:, t, :, None]).sum(-1)
        change = beta[:, t, :, None] * (v[:, t] - predicted)
        state = state + change[..., None] * k[:, t, :, None]
        outputs.append((state * q[:, t, :, None]).sum(-1))
    return mx.stack(outputs, axis=1), state


def step_rule(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array
) -> Outputs:
    """One token (T = 1), reading the old state once: S' q = decay (S q) + (k . q) change."""
    B, _, Hk, Dk = k.shape
    _, Hv, Dv, _ = state.shape
    old = state.reshape(B, Hk, -1, Dv, Dk)
    decay = mx.exp(log_decay).reshape(B, Hk, -1, 1)
    keys = mx.stack([k[:, 0], q[:, 0]], axis=-1)[:, :, None]  # (B, Hk, 1, Dk, 2)
    read = old @ keys  # (B, Hk, r, Dv, 2)
    change = beta.reshape(decay.shape) * (v.reshape(B, Hk, -1, Dv) - decay * read[..., 0])
    new = old * decay[..., None] + change[..., None] * k[:, 0, :, None, None]
    out = decay * read[..., 1] + change * (k * q).sum(-1).reshape(B, Hk, 1, 1)
    return out.reshape(B, 1, Hv, Dv), new.reshape(state.shape)


def chunked_rule(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array, chunk: int = CHUNK
) -> Outputs:
    """The WY form over chunks of `chunk` tokens (a power of two): matrix products, sequential only from chunk to chunk.

    In a chunk with G the running sum of log_decay and S the state that enters it (arXiv:2412.06464, section 3.3):

        A_ij = beta_i exp(G_i - G_j) k_i . k_j  (j < i)          [U, W] = (I + A)^-1 [beta v, beta exp(G) k]
        V' = U - W S^T        O = exp(G) q S^T + (exp(G_i - G_j) q_i . k_j)_{j <= i} V'
        S <- exp(G_L) S + V'^T (exp(G_L - G) k)

    Every exponent is at most 0; those above the diagonal are masked before exp, where they could overflow.
    """
    c = chunks_of(q, k, v, log_decay, beta, chunk)
    S = state.reshape(*c.E.shape[1:4], *state.shape[2:])
    outputs = []
    for n in range(len(c.U)):
        WS, QS = mx.split(c.reads[n] @ mx.swapaxes(S, -1, -2), 2, axis=-2)
        change = c.U[n] - WS
        outputs.append(QS + c.P[n] @ change)
        S = mx.addmm(c.E[n] * S, mx.swapaxes(change, -1, -2), c.K[n])
    return in_order(mx.stack(outputs), v.shape[1]), S.reshape(state.shape)


class Chunks(NamedTuple):
    """The chunks of `chunked_rule`, in its notation, and what they are made of; (N, B, Hk, r, ...), r of q and k 1."""

    q: mx.array  # (..., L, Dk)
    k: mx.array  # (..., L, Dk)
    v: mx.array  # (..., L, Dv)
    beta: mx.array  # (..., L, 1)
    from_start: mx.array  # (..., L, 1) exp(G)
    to_end: mx.array  # (..., L, 1) exp(G_L - G)
    decay: mx.array  # (..., L, L) exp(G_i - G_j), 0 above the diagonal
    A: mx.array  # (..., L, L)
    X: mx.array  # (..., L, L) (I + A)^-1
    UW: mx.array  # (..., L, Dv + Dk)
    U: mx.array  # (..., L, Dv)
    reads: mx.array  # (..., 2 L, Dk) W and below it exp(G) q: both meet the state that enters the chunk
    P: mx.array  # (..., L, L) decay (q k^T)
    K: mx.array  # (..., L, Dk) exp(G_L - G) k
    E: mx.array  # (..., 1, 1) exp(G_L)


def chunks_of(q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, chunk: int) -> Chunks:
    """The chunks of what `chunked_rule` takes. The last one is filled up with tokens that neither decay nor write."""
    Hk, r = k.shape[2], v.shape[2] // k.shape[2]
    q, k = by_chunk(q, Hk, 1, chunk), by_chunk(k, Hk, 1, chunk)
    v, log_decay, beta = (by_chunk(x, Hk, r, chunk) for x in (v, log_decay, beta))
    G = mx.cumsum(log_decay, axis=-1)
    row = mx.arange(chunk)[:, None]
    above = mx.where(row < row.T, -mx.inf, 0.0)  # adding is faster than choosing on a CPU
    decay = exp(G[..., :, None] - G[..., None, :] + above)
    keys = mx.swapaxes(k, -1, -2)
    A = (beta[..., None] * (row > row.T)) * decay * (k @ keys)
    from_start, to_end, beta = mx.exp(G)[..., None], mx.exp(G[..., -1:] - G)[..., None], beta[..., None]
    X = unit_lower_inverse(A)
    UW = X @ mx.concatenate([beta * v, (beta * from_start) * k], axis=-1)
    U, W = mx.split(UW, [v.shape[-1]], axis=-1)
    reads = mx.concatenate([W, from_start * q], axis=-2)
    return Chunks(
        q, k, v, beta, from_start, to_end, decay, A, X, UW, U, reads, P=decay * (q @ keys), K=to_end * k,
        E=mx.exp(G[..., -1])[..., None, None],
    )  # fmt: skip


def by_chunk(x: mx.array, Hk: int, r: int, chunk: int) -> mx.array:
    """(B, T, Hk r, ...) -> (N, B, Hk, r, L, ...), the last chunk filled up with zeros."""
    padding = -x.shape[1] % chunk
    if padding:
        x = mx.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
    x = x.reshape(x.shape[0], -1, chunk, Hk, r, *x.shape[3:])
    return mx.moveaxis(mx.moveaxis(x, 1, 0), 2, 4)


def in_order(x: mx.array, T: int) -> mx.array:
    """(N, B, Hk, r, L, ...) -> (B, T, Hk r, ...)"""
    x = mx.moveaxis(mx.moveaxis(x, 4, 2), 0, 1)
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], *x.shape[5:])[:, :T]


def unit_lower_inverse(A: mx.array) -> mx.array:
    """(I + A)^-1 for strictly lower triangular A (..., L, L), L a power of two. By LAPACK or by doubling."""
    return by_hand(_inverse, _inverse_gradient, A) if backend().differentiates else _inverse(A)


def _inverse(A: mx.array) -> mx.array:
    return mx.linalg.tri_inv(A + mx.eye(A.shape[-1])) if backend().inverts_by_lapack else doubling_inverse(A)


def _inverse_gradient(primals: Arrays, dX: mx.array, X: mx.array) -> Arrays:
    """dA = -X^T dX X^T, of which the strictly lower part counts: the rest of A is always 0."""
    transposed = mx.swapaxes(X, -1, -2)
    return [-(transposed @ dX @ transposed)]


def doubling_inverse(A: mx.array) -> mx.array:
    """`unit_lower_inverse` by recursive doubling, in log2(L) pairs of products.

    With P and Q the inverses of two neighbouring diagonal blocks and R the block below P, the block of the pair's
    inverse is -Q R P. The Neumann series, a sum of powers of A, would cancel catastrophically where keys repeat (an
    error of 8e17 was measured at L = 64).
    """
    L = A.shape[-1]
    index = mx.arange(L)
    inverse = mx.broadcast_to(mx.eye(L), A.shape)
    size = 1
    while size < L:
        block = index // size
        below = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
        R = mx.where(below, A, 0.0)
        inverse = inverse - (R if size == 1 else inverse @ R @ inverse)
        size *= 2
    return inverse
