"""Which input columns of each matrix matter: the mean square of what they are multiplied with on a text.

A squared error of a weight costs the output that much. One pass, one layer in memory, for the text model; the draft
head and the vision tower are not run.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import TEXT
from mlx_qwen35.convert.progress import percent
from mlx_qwen35.load import choose_dtype
from mlx_qwen35.measure.layerwise import Layerwise, make_batches
from mlx_qwen35.model.layers import Joined, Linear
from mlx_qwen35.model.weights import Weights


def statistics(
    checkpoint: Checkpoint, tokens: Sequence[Sequence[int]], dtype: mx.Dtype | None = None
) -> dict[str, np.ndarray]:
    """Hugging Face name of each matrix of the text model -> (columns,) float32, mean squares over all tokens.

    A tied embedding is taken as the head that it also is; one that is not tied has no inputs and no entry.
    """
    batches = make_batches(tokens, checkpoint.config.text.vocab_size)
    sums: dict[str, np.ndarray] = {}
    model = Layerwise(checkpoint, choose_dtype(checkpoint, dtype), lambda weights: _Watched.of(weights, sums))
    states = model.embed(batches)
    count = sum(batch.tokens.size for batch in batches)
    with percent("calibrating", count * model.weights_from(0)) as told:
        for i in range(model.config.num_hidden_layers):
            model.advance(i, states, told)
    norm = model.norm()
    head = f"{TEXT}embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    sums[head] = sum(_column_squares(norm(x)) for x in states)
    return {name: (total / count).astype(np.float32) for name, total in sums.items()}


def _column_squares(x: mx.array) -> np.ndarray:
    """(B, T, columns) -> (columns,) float64 sums."""
    x = x.astype(mx.float32)
    return np.asarray(mx.square(x).sum(axis=(0, 1))).astype(np.float64)


class _Watched(Weights):
    """Weights whose linear maps note what they read."""

    sums: dict[str, np.ndarray]

    @classmethod
    def of(cls, weights: Weights, sums: dict[str, np.ndarray]) -> "_Watched":
        own = cls(weights.arrays, weights.packing, weights.dtype, weights.eps, weights.kept, weights.prefix)
        own.sums = sums
        return own

    def at(self, prefix: str) -> "_Watched":
        return self.of(super().at(prefix), self.sums)

    def linear(self, name: str) -> "_Recorder":
        return _Recorder(super().linear(name), self, (name,))

    def joined(self, *names: str) -> "_Recorder":
        return _Recorder(super().joined(*names), self, names)


class _Recorder(nn.Module):
    """A linear map, or several of one input, that adds up the squares of its input."""

    def __init__(self, inner: Linear | Joined, weights: _Watched, names: tuple[str, ...]):
        super().__init__()
        self.inner = inner
        self._sums, self._names = weights.sums, [f"{weights.prefix}{name}.weight" for name in names]

    def __call__(self, x: mx.array) -> mx.array | list[mx.array]:
        self._note(x)
        return self.inner(x)

    def whole(self, x: mx.array) -> list[mx.array]:
        self._note(x)
        return self.inner.whole(x)

    def split(self, products: Sequence[mx.array]) -> list[mx.array]:
        return self.inner.split(products)

    def _note(self, x: mx.array) -> None:
        squares = _column_squares(x)
        for name in self._names:
            self._sums[name] = self._sums.get(name, 0) + squares
