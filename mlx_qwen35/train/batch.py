"""Rows that go through the model together: the model's own layers over them, with nothing before and nothing after."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.kv_format import UNQUANTIZED, Columns
from mlx_qwen35.cache.layer import DeltaCache, ForwardContext, KVCache, LayerCache
from mlx_qwen35.checkpoint.config import FULL
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.gated_delta import DeltaState
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.model.model import Model, Visual
from mlx_qwen35.prompt.positions import positions
from mlx_qwen35.train.rows import Row


class Batch:
    """B rows as (B, T) tokens, T of the longest one; the rest of a shorter one is padding, which changes nothing.

    rows, targets: (n,) each. Hidden state rows[i], counted over all B T of them, predicts the token targets[i].
    """

    def __init__(self, model: Model, rows: Sequence[Row], embeddings: Sequence[mx.array] | None = None):
        """embeddings: of each row's images and videos (n, D), in the order of their placeholders; None: no row has any.

        Raises InputError embeddings_mismatch where their number is another.
        """
        self.model = model
        counts = tuple(len(row.tokens) for row in rows)
        T = max(counts)
        self.tokens = mx.array([[*row.tokens, *[0] * (T - len(row.tokens))] for row in rows])
        self.visual = _visual(rows, embeddings)
        table = _positions(rows, T)
        self.context = ForwardContext(counts, None, table)  # what is behind a row's end reaches nothing before it
        self.rotary = model.rotary.table(table)
        self.caches = _passing_caches(model, len(rows))
        learnt = [(b * T + t - 1, row.tokens[t]) for b, row in enumerate(rows) for t in np.flatnonzero(row.targets)]
        self.rows, self.targets = (mx.array(np.array(learnt, np.int32).reshape(-1, 2)[:, i]) for i in (0, 1))
        mx.eval(self.tokens, self.rotary, self.rows, self.targets)

    def embed(self, adapters: ActiveAdapters | None) -> mx.array:
        """(B, T, D)"""
        return self.model.embed(self.tokens, self.visual, adapters)

    def layer(self, i: int, x: mx.array, adapters: ActiveAdapters | None) -> mx.array:
        """x (B, T, D) through layer i of the model."""
        context = self.context._replace(adapters=adapters)
        x, delta = self.model.layers[i](x, None, self.rotary, context, self.caches[i])
        return x + delta


def _positions(rows: Sequence[Row], T: int) -> mx.array:
    """(B, T), or (3, B, T) where a row shows something."""
    placeholders = [[p for placed in row.media for p in placed.placeholders] for row in rows]
    if not any(placeholders):
        return mx.broadcast_to(mx.arange(T), (len(rows), T))
    return mx.array(np.stack([positions(T, own) for own in placeholders], axis=1))


def _visual(rows: Sequence[Row], embeddings: Sequence[mx.array] | None) -> Visual | None:
    places, given = [], []
    for b, row in enumerate(rows):
        own = [(b, at) for placed in row.media for p in placed.placeholders for at in range(p.start, p.stop)]
        count = 0 if embeddings is None else len(embeddings[b])
        if count != len(own):
            raise InputError(
                "embeddings_mismatch",
                f"there must be one embedding for each placeholder; there are {count} for {len(own)} in row {b}",
            )
        if embeddings is not None and count:
            places += own
            given.append(embeddings[b])
    if not places:
        return None
    index = mx.array(places)
    return Visual(index[:, 0], index[:, 1], mx.concatenate(given))


# --- stand-ins for caches --------------------------------------------------------------------------------------------


class PassingKeys(KVCache):
    """Gives each row the keys and values of this pass, and holds none."""

    def __init__(self) -> None:
        super().__init__([], UNQUANTIZED)

    def append(self, keys: mx.array, values: mx.array, counts: Sequence[int]) -> list[Columns]:
        arrays = [{"keys": keys[i : i + 1], "values": values[i : i + 1]} for i in range(len(counts))]
        return [Columns(own, count) for own, count in zip(arrays, counts, strict=True)]


class _PassingStates(DeltaCache):
    """Gives zero states, and forgets those after the pass."""

    def append(self, values: DeltaState, stepwise: bool) -> None:
        """Nothing is held."""


def _passing_caches(model: Model, batch: int) -> list[LayerCache]:
    config = model.config
    _, Hv, Dk, Dv, K = config.delta_heads
    conv, recurrent = (batch, K - 1, config.conv_dim), (batch, Hv, Dv, Dk)
    zeros = DeltaState(mx.zeros(conv, model.dtype), mx.zeros(recurrent, mx.float32))
    mx.eval(zeros)
    return [PassingKeys() if kind == FULL else _PassingStates(zeros) for kind in config.layer_types]
