"""Loss and gradients of the draft head, which learns the same rows beside the text model.

The head reads pairs, as while it drafts (engine/drafts/follower.py): the hidden state of token i, after the final norm,
and the embedding of token i + 1. It predicts token i + 2. The hidden states are given, so nothing flows back into the
text model, and what that learns does not depend on the head.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.train.batch import Batch, PassingKeys
from mlx_qwen35.train.gradients import Backward, Gradients, Parameters
from mlx_qwen35.train.loss import piecewise_loss
from mlx_qwen35.train.rows import Row
from mlx_qwen35.train.traced import active


class DraftLoss(NamedTuple):
    """What a batch gives. Loss and gradients are sums over its targets: divided by their count they are the mean's."""

    loss: float  # sum of -log p over the targets
    targets: int
    gradients: Gradients  # of the head's low-rank parts; empty for a loss alone


def draft_gradients(
    model: Model,
    parameters: Mapping[str, Pair],
    rows: Sequence[Row],
    hidden: mx.array,
    *,
    embeddings: Sequence[mx.array] | None = None,
    pieces: int = 256,
    backward: bool = True,
) -> DraftLoss:
    """Loss and gradients of the head over rows that went through the model together. All is evaluated.

    A row's second token is no target of the head, which drafts nothing before it has seen two tokens.

    Args:
        parameters: low-rank parts; gradients are of those whose names begin with mtp. Those of the table of tokens and
            of the LM head are beside them, as they are while tokens are drafted.
        hidden: (B, T, D) after the final norm, of the text model with the same parameters, see `BatchLoss`.
        embeddings: of each row's images and videos, (n, D) in the order of their placeholders; None: no row has any.
        pieces: hidden states whose logits are in memory at a time.
        backward: whether gradients are wanted.

    Raises InputError draft_head_missing for a model without a head.
    """
    if model.mtp is None:
        raise InputError("draft_head_missing", "this model has no draft head (tensors mtp.*) to be trained along")
    batch = Batch(model, rows, embeddings)
    names = [name for name in parameters if name.startswith(MTP)]
    others = {name: pair for name, pair in parameters.items() if name not in names}
    run = _Head(model, batch, hidden, others)
    drafted = run(None, {name: parameters[name] for name in names})
    at, targets = _targets(batch)
    found = piecewise_loss(
        lambda rows: model.logits(rows, active(others)), drafted.reshape(-1, drafted.shape[-1])[at], targets,
        pieces=pieces, backward=backward,
    )  # fmt: skip
    if found.hidden is None:
        return DraftLoss(found.loss, len(targets), {})
    back, dx = Backward({name: parameters[name] for name in names}), mx.zeros_like(drafted)
    back.dx = dx.reshape(-1, dx.shape[-1]).at[at].add(found.hidden).reshape(dx.shape)
    back.scale = found.scale
    back.through(run, None, names, further=False)
    return DraftLoss(found.loss, len(targets), back.sums)


class _Head:
    """The head over the pairs of a batch, of its low-rank parts: (B, T, D).

    Each row's last pair has no next token. Nothing sees it, and it predicts no target.
    """

    def __init__(self, model: Model, batch: Batch, hidden: mx.array, others: Parameters):
        assert model.mtp is not None
        self.head, self.batch, self.hidden = model.mtp.part, batch, hidden
        embedded = batch.embed(active(others))
        self.embedded = mx.concatenate([embedded[:, 1:], embedded[:, :1]], axis=1)
        mx.eval(self.embedded)

    def __call__(self, _: None, pairs: Parameters) -> mx.array:
        context = self.batch.context._replace(adapters=active(pairs))
        caches = [PassingKeys() for _ in self.head.layers]
        return self.head(self.embedded, self.hidden, self.batch.rotary, context, caches)


def _targets(batch: Batch) -> tuple[mx.array, mx.array]:
    """(n,) of the pairs that predict a target, counted over all B T of the batch, and the targets."""
    at, targets = np.array(batch.rows), np.array(batch.targets)
    behind = at % batch.tokens.shape[1] > 0
    return mx.array(at[behind] - 1), mx.array(targets[behind])
