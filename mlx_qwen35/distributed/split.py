"""What a rank computes of a pass, beside the others: the interface of `tensor.py` and `pipeline.py`."""

from typing import Protocol

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import ForwardContext
from mlx_qwen35.model.decoder import Pace
from mlx_qwen35.model.model import Model, Visual


class Split(Protocol):
    """A rank's part of what the ranks of a model compute together. Every rank calls it alike, in the same order.

    It is given the model of the rank's share each time, since rank 0's model holds it.
    """

    def run(
        self, model: Model, tokens: mx.array, visual: Visual | None, context: ForwardContext, cache: Cache,
        at: mx.array | None, pace: Pace,
    ) -> mx.array:  # fmt: skip
        """A pass, its arguments as of `Model.hidden`; visual holds zeros on ranks other than 0. On rank 0 (B, T, D)
        after the final norm; elsewhere what must be evaluated.
        """
