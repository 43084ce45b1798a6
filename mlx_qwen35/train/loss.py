"""The loss of hidden states that predict a token each, over the vocabulary in pieces."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.backend import gradients
from mlx_qwen35.kernels.by_hand import Arrays, by_hand
from mlx_qwen35.kernels.elementwise import exp

Head = Callable[..., mx.array]  # (hidden (n, D), *parameters) -> logits (n, V)


class PiecewiseLoss(NamedTuple):
    """The sum of -log p of the targets, and its gradients. Evaluated."""

    loss: float
    hidden: mx.array | None  # (n, D) like the hidden states; None where no gradients are wanted
    parameters: Sequence[mx.array]  # of the head's parameters; empty where no gradients are wanted


def piecewise_loss(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    parameters: Sequence[mx.array] = (),
    *,
    pieces: int = 256,
    backward: bool = True,
) -> PiecewiseLoss:
    """The loss of hidden states (n, D) that predict the tokens `targets` (n,), n at least 0.

    pieces: hidden states whose logits are in memory at a time: each piece is evaluated by itself. backward: whether
    gradients are wanted.
    """
    loss, rows = 0.0, []
    totals = [mx.zeros_like(array) for array in parameters] if backward else []
    for start in range(0, len(targets), pieces):
        piece, wanted = hidden[start : start + pieces], targets[start : start + pieces]

        def summed(piece: mx.array, *own: mx.array, wanted: mx.array = wanted) -> list[mx.array]:
            return [token_losses(head(piece, *own), wanted).sum()]

        if backward:
            with gradients():
                (value,), found = mx.vjp(summed, [piece, *parameters], [mx.ones(())])
            rows.append(found[0])
            totals = [total + own for total, own in zip(totals, found[1:], strict=True)]
        else:
            (value,) = summed(piece, *parameters)
        mx.eval(value, rows[-1:], totals)
        loss += float(value)
    if not backward:
        return PiecewiseLoss(loss, None, ())
    return PiecewiseLoss(loss, mx.concatenate(rows) if rows else hidden, totals)


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """(n,) float32, -log p of each target (n,) by the softmax of logits (n, V), in float32."""
    return by_hand(functools.partial(_losses, targets=targets), functools.partial(_gradient, targets=targets), logits)


def _losses(logits: mx.array, targets: mx.array) -> mx.array:
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits.astype(mx.float32), axis=-1) - picked.astype(mx.float32)


def _gradient(primals: Arrays, d_losses: mx.array, losses: mx.array, targets: mx.array) -> Arrays:
    """softmax(logits) - onehot(target), times the cotangent of each loss."""
    (logits,) = primals
    index = targets[:, None]
    picked = mx.take_along_axis(logits, index, axis=-1).astype(mx.float32)
    total = losses[:, None] + picked  # the log of the sum of exponentials
    p = exp(logits.astype(mx.float32) - total)
    p = mx.put_along_axis(p, index, mx.take_along_axis(p, index, axis=-1) - 1, axis=-1)
    return [(d_losses[:, None] * p).astype(logits.dtype)]
