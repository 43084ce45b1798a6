"""The importance of each input column of a matrix: the mean square of its inputs on a text.

A squared error of a weight costs the output that much. One pass, one layer in memory, for the text model; the MTP head
and the vision encoder are not run.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import TEXT
from mlx_qwen35.convert.progress import percent
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.load import choose_dtype
from mlx_qwen35.measure.layerwise import Layerwise, make_batches
from mlx_qwen35.model.layers import Joined, Linear
from mlx_qwen35.model.weights import Weights


def statistics(
    checkpoint: Checkpoint, tokens: Sequence[Sequence[int]], adapter: Adapter | None = None
) -> dict[str, np.ndarray]:
    """Hugging Face name of each matrix of the text model -> (columns,) float32, mean squares over all tokens.

    A tied embedding counts as the lm_head that it also is; an untied one has no inputs and no entry. adapter: fused
    into the weights.
    """
    batches = make_batches(tokens, checkpoint.config.text.vocab_size)
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(1))
    dtype = choose_dtype(checkpoint, None)
    model = Layerwise(checkpoint, dtype, lambda weights: _RecordedWeights.of(weights, sums), adapter=adapter)
    states = model.embed(batches)
    count = sum(batch.tokens.size for batch in batches)
    with percent("calibrating", count * model.weights_from(0)) as progress:
        for i in range(model.config.num_hidden_layers):
            model.advance(i, states, progress)
    norm = model.norm()
    head = f"{TEXT}embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    for x in states:
        sums[head] = sums[head] + _column_squares(norm(x))
    return {name: (total / count).astype(np.float32) for name, total in sums.items()}


def _column_squares(x: mx.array) -> np.ndarray:
    """(B, T, columns) -> (columns,) float64 sums."""
    x = x.astype(mx.float32)
    return np.asarray(mx.square(x).sum(axis=(0, 1))).astype(np.float64)


class _RecordedWeights(Weights):
    """Weights whose linear maps record their inputs."""

    sums: dict[str, np.ndarray]

    @classmethod
    def of(cls, weights: Weights, sums: dict[str, np.ndarray]) -> "_RecordedWeights":
        own = cls(weights.arrays, weights.quantization, weights.dtype, weights.eps, weights.keep_fp32, weights.prefix)
        own.sums = sums
        return own

    def at(self, prefix: str) -> "_RecordedWeights":
        return self.of(super().at(prefix), self.sums)

    def linear(self, name: str) -> Any:  # a _Recorder, which a layer calls like a Linear
        return _Recorder(super().linear(name), self, (name,))

    def joined(self, *names: str) -> Any:  # the same, like a Joined
        return _Recorder(super().joined(*names), self, names)


class _Recorder(nn.Module):
    """A linear map, or several of one input, that adds the squares of its input to the sums."""

    def __init__(self, inner: Linear | Joined, weights: _RecordedWeights, names: tuple[str, ...]):
        super().__init__()
        self.inner = inner
        self._sums, self._names = weights.sums, [f"{weights.prefix}{name}.weight" for name in names]

    def __call__(self, x: mx.array, adapters: ActiveAdapters | None = None) -> mx.array | list[mx.array]:
        self._record(x)
        return self.inner(x, adapters)

    def whole(self, x: mx.array, adapters: ActiveAdapters | None = None) -> list[mx.array]:
        self._record(x)
        return self.inner.whole(x, adapters)

    def split(self, products: Sequence[mx.array]) -> list[mx.array]:
        return self.inner.split(products)

    def _record(self, x: mx.array) -> None:
        squares = _column_squares(x)
        for name in self._names:
            self._sums[name] = self._sums[name] + squares
