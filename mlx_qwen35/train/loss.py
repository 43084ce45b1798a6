"""The loss of hidden states that predict a token each, over the vocabulary in pieces."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.backend import backend, gradients
from mlx_qwen35.budget.training import SLICE
from mlx_qwen35.kernels.cpu import PIECE
from mlx_qwen35.kernels.elementwise import exp

LARGEST = 64.0  # size that float16 gradients are brought to, so that their small elements do not vanish

Head = Callable[..., mx.array]  # (hidden (n, D), *parameters) -> logits (n, V)


class PiecewiseLoss(NamedTuple):
    """The sum of -log p of the targets, and its gradients. Evaluated."""

    loss: float
    hidden: mx.array | None  # (n, D) like the hidden states, times `scale`; None where no gradients are wanted
    parameters: Sequence[mx.array]  # of the head's parameters; empty where no gradients are wanted
    scale: float = 1.0  # LARGEST where the logits are float16


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
    loss, rows, scale = 0.0, [], 1.0
    totals = [mx.zeros_like(array) for array in parameters] if backward else []
    for start in range(0, len(targets), pieces):
        piece, wanted = hidden[start : start + pieces], targets[start : start + pieces]
        losses, d_logits = cross_entropy(head(piece, *parameters), wanted, backward)
        mx.eval(losses, d_logits)
        loss += float(losses.sum())
        if d_logits is None:
            continue
        with gradients():  # of a linear map: its product is not computed again
            _, found = mx.vjp(lambda *given: [head(*given)], [piece, *parameters], [d_logits])
        scale = LARGEST if d_logits.dtype == mx.float16 else 1.0
        del d_logits
        rows.append(found[0])
        totals = [total + own / scale for total, own in zip(totals, found[1:], strict=True)]
        mx.eval(rows[-1], totals)
    if not backward:
        return PiecewiseLoss(loss, None, ())
    return PiecewiseLoss(loss, mx.concatenate(rows) if rows else hidden, totals, scale)


def cross_entropy(logits: mx.array, targets: mx.array, backward: bool) -> tuple[mx.array, mx.array | None]:
    """-log p of each target (n,) by the softmax of logits (n, V), in float32; and the gradient of its sum, if wanted.

    The gradient is the softmax, less 1 at the target, in the dtype of the logits; in float16, which ends at 6e-8, times
    LARGEST. It takes the place of the logits in memory.
    """
    n, V = logits.shape
    step = max(1, (PIECE if backend().works_in_pieces else SLICE) // V)
    losses = []
    mx.eval(logits)
    for start in range(0, n, step):
        some = slice(start, start + step)
        loss, gradient = _of_slice(logits[some], targets[some], backward)
        mx.eval(loss, gradient)  # so that nothing but `logits` holds its memory, and MLX writes into it
        losses.append(loss)
        if gradient is not None:
            logits[some] = gradient
            mx.eval(logits)
    return mx.concatenate(losses), logits if backward else None


def _of_slice(logits: mx.array, targets: mx.array, backward: bool) -> tuple[mx.array, mx.array | None]:
    x, index = logits.astype(mx.float32), targets[:, None]
    x = x - x.max(-1, keepdims=True)
    picked = mx.take_along_axis(x, index, axis=-1)
    x = exp(x)
    total = x.sum(-1, keepdims=True)
    losses = (mx.log(total) - picked)[:, 0]
    if not backward:
        return losses, None
    gradient = (x / total).at[mx.arange(len(x))[:, None], index].add(-1.0)
    return losses, (gradient * LARGEST if logits.dtype == mx.float16 else gradient).astype(logits.dtype)
