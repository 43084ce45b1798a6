"""The gradient of the gated delta rule over chunks, written by hand. `chunked_rule`, differentiated, is its slow twin.

What is kept of the way forward are the six inputs and the state that enters each segment, a few chunks. Back, from the
last segment to the first, each is prepared again (`chunks_of`): so no more than one segment's arrays exist at a time.
There are no powers of A, and nothing but products. Letters and notation are those of gated_delta.py, d a gradient.
"""

import mlx.core as mx

from mlx_qwen35.kernels.by_hand import Arrays, by_hand
from mlx_qwen35.kernels.gated_delta import CHUNK, Outputs, by_chunk, chunked_rule, chunks_of, in_order

SEGMENT = 8  # chunks of all rows together: half as many take a third less memory and a tenth more time


def differentiable_rule(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array
) -> Outputs:
    """`chunked_rule` with a gradient."""
    out, new, _ = by_hand(_forward, _backward, q, k, v, log_decay, beta, state)
    return out, new


def _segments(x: mx.array) -> list[slice]:
    """Of the tokens of x (B, T, ...)."""
    B, T = x.shape[:2]
    step = CHUNK * max(1, SEGMENT // B)
    return [slice(start, min(start + step, T)) for start in range(0, T, step)]


def _forward(*given: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Output, new state, and the states that enter the segments (M, B, Hv, Dv, Dk)."""
    tokens, state = given[:-1], given[-1]
    outputs: list[mx.array] = []
    entering: list[mx.array] = []
    for some in _segments(tokens[0]):
        entering.append(state)
        # In sequence: else MLX would hold the arrays of all segments.
        own = mx.depends([x[:, some] for x in tokens], [state, *outputs[-1:]])
        q, k, v, log_decay, beta = own
        out, state = chunked_rule(q, k, v, log_decay, beta, state)
        outputs.append(out)
    return mx.concatenate(outputs, axis=1), state, mx.stack(entering)


def _backward(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    d_out, d_state, _ = cotangents
    found: list[list[mx.array]] = []
    for some, state in reversed(list(zip(_segments(d_out), outputs[2], strict=True))):
        own = mx.depends([x[:, some] for x in (*primals[:-1], d_out)], [d_state, *(found[-1] if found else [])])
        gradients, d_state = _segment(own, state, d_state)
        found.append(gradients)
    return [*(mx.concatenate([own[i] for own in reversed(found)], axis=1) for i in range(5)), d_state]


def _segment(given: list[mx.array], state: mx.array, d_state: mx.array) -> tuple[list[mx.array], mx.array]:
    """The gradients of q, k, v, log_decay and beta of a segment, and of the state that enters it.

    given: those five, and the gradient of the segment's output. d_state: that of the state behind it.
    """
    q, k, v, log_decay, beta, d_out = given
    c = chunks_of(q, k, v, log_decay, beta, CHUNK)
    N, B, Hk, r, _, Dv = c.v.shape
    W, Q = mx.split(c.reads, 2, axis=-2)
    dO = by_chunk(d_out, Hk, r, CHUNK)
    S, dS = (x.reshape(B, Hk, r, Dv, -1) for x in (state, d_state))
    before, after, change, d_change = [], [], [], []  # of each chunk: the state, the gradient of the next state, C, dC
    for n in range(N):
        before.append(S)
        change.append(c.U[n] - W[n] @ _t(S))
        S = mx.addmm(c.E[n] * S, _t(change[n]), c.K[n])
    read, written = _t(dO) @ Q, _t(c.P) @ dO
    for n in reversed(range(N)):
        after.append(dS)
        d_change.append(mx.addmm(written[n], c.K[n], _t(dS)))
        dS = c.E[n] * dS + read[n] - _t(d_change[-1]) @ W[n]
    S, C, dS_next, dC = (mx.stack(own) for own in (before, change, after[::-1], d_change[::-1]))

    dK, dQ, dP = C @ dS_next, dO @ S, dO @ _t(C)
    R = _t(c.X) @ mx.concatenate([dC, -dC @ S], axis=-1)
    dA = mx.tril(-R @ _t(c.UW), -1)
    Ru, Rw = mx.split(R, [Dv], axis=-1)
    inside = c.beta * c.from_start * Rw  # of k, by W
    M, F = dA * (c.beta * c.decay), dP * c.decay
    dq = F @ c.k + c.from_start * dQ
    dk = inside + (M + _t(M)) @ c.k + _t(F) @ c.q + c.to_end * dK
    by_A, by_K = dA * c.A, (dK * c.K).sum(-1)
    d_beta = (Ru * c.v).sum(-1) + (c.from_start * Rw * c.k).sum(-1) + (dA * c.decay * (c.k @ _t(c.k))).sum(-1)
    H = by_A + dP * c.P
    dG = (inside * c.k).sum(-1) + (dQ * Q).sum(-1) - by_K + H.sum(-1) - H.sum(-2)
    last = by_K.sum(-1) + (c.E * dS_next * S).sum((-1, -2))
    dG = mx.concatenate([dG[..., :-1], dG[..., -1:] + last[..., None]], axis=-1)
    d_decay = mx.cumsum(dG, axis=-1, reverse=True)
    heads = dq.sum(3, keepdims=True), dk.sum(3, keepdims=True), c.beta * Ru, d_decay, d_beta
    return [in_order(x, v.shape[1]) for x in heads], dS.reshape(state.shape)


def _t(x: mx.array) -> mx.array:
    return mx.swapaxes(x, -1, -2)
