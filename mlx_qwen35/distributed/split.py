"""What a rank computes of a pass, beside the others: the interface of `tensor.py` and `pipeline.py`."""

from typing import Protocol

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import ForwardContext
from mlx_qwen35.model.decoder import Pace
from mlx_qwen35.model.model import Visual


class Split(Protocol):
    """A rank's part of what the ranks of a model compute together. Every rank calls it alike, in the same order."""

    def run(
        self, tokens: mx.array, visual: Visual | None, context: ForwardContext, cache: Cache, at: mx.array | None,
        pace: Pace,
    ) -> mx.array:  # fmt: skip
        """A pass, its arguments as of `Model.hidden`; visual holds zeros beside rank 0. (B, T, D) after the final norm
        on rank 0; elsewhere what must be evaluated.
        """
