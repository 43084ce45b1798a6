"""Loss and gradients of a batch of rows, layer by layer.

Forward, each layer's input is kept. The loss goes over the vocabulary in pieces, which give the gradient of the hidden
states. Backward, each layer runs again from its input, and gives the gradients of its low-rank parts and of its input.
So memory holds one layer's intermediate results at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.model.model import Model
from mlx_qwen35.train.rows import Row

Parameters = Mapping[str, Pair]  # what is trained, float32: name of a weight -> its low-rank part


class BatchLoss(NamedTuple):
    """What a batch gives. Loss and gradients are sums over its targets: divided by their count they are the mean's."""

    loss: float  # sum of -log p over the targets
    targets: int
    gradients: Mapping[str, tuple[mx.array, mx.array]]  # of A and of B, by the weight's name; empty for a loss alone
    hidden: mx.array  # (B, T, D) after the final norm


def batch_loss(
    model: Model,
    parameters: Parameters,
    rows: Sequence[Row],
    *,
    embeddings: Sequence[mx.array] | None = None,
    pieces: int = 256,
    backward: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> BatchLoss:
    """embeddings: of each row's images and videos, in the order of their placeholders. pieces: rows of hidden states
    whose logits are there at a time. backward: whether gradients are wanted. progress: called after each layer.
    """
    raise NotImplementedError
