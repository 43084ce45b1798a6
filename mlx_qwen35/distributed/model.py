"""Rank 0's model, for the rest of the program a model like any other."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.budget.plan import kv_bytes, state_bytes
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.kv_format import KVFormat
from mlx_qwen35.cache.layer import ForwardContext
from mlx_qwen35.cache.prefix import PrefixLibrary, library_bytes
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.distributed.group import Group
from mlx_qwen35.distributed.mirror import MirroredCache
from mlx_qwen35.distributed.orders import Orders, rows_of, sent
from mlx_qwen35.distributed.pipeline import PipelineSplit
from mlx_qwen35.distributed.split import Split
from mlx_qwen35.distributed.tensor import TensorSplit
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.model.decoder import Pace, unpaced
from mlx_qwen35.model.model import Model, Visual
from mlx_qwen35.model.weights import Weights
from mlx_qwen35.values import whole


@dataclass(frozen=True)
class Holding:
    """What another rank holds, and the bytes that its model may take."""

    held: TextConfig
    memory_limit: int


class LeadingModel(Model):
    """A model whose other parts are on other ranks, which obey its orders.

    `config` is the whole model's, `held` that of what is here.
    """

    def __init__(
        self, config: TextConfig, group: Group, orders: Orders, others: Sequence[Holding], held: TextConfig,
        weights: Weights, memory_limit: int, kv: KVFormat,
    ):  # fmt: skip
        """config: of the whole model. The last four are what `load_model` gives to what makes a model."""
        super().__init__(held, weights, memory_limit, kv)
        self.config, self.orders = config, orders
        self.split = self._part(group)
        self._library = library_limit([Holding(held, memory_limit), *others], self.dtype, kv)

    def _part(self, group: Group) -> Split:
        """Rank 0's part of what the ranks compute together."""
        raise NotImplementedError

    def make_cache(self, batch: int = 1, adapter: str | None = None) -> Cache:
        whole("batch", batch, 1)
        adapters = (self.adapters.named(adapter),) * batch
        return MirroredCache(self.orders, self.held, self.dtype, self.kv, adapters)

    def chunk(self, context: int) -> int:
        """The shortest chunk that a rank chooses: each has its own chip, and memory of its own."""
        with self.orders.together():
            told = self.orders.ask("chunk", context=context)
            return min(super().chunk(context), *(own["chunk"] for own in told))

    def make_library(self, memory: float | None = None) -> PrefixLibrary:
        """As `Model.make_library`. memory: of what is here; None: as much that no rank's part of it takes more than
        the library of a model of its own would.
        """
        return PrefixLibrary(self, self._library) if memory is None else super().make_library(memory)

    def hidden(self, *given: Any, **named: Any) -> mx.array:
        with self.orders.together():
            return super().hidden(*given, **named)

    def _pass(
        self, tokens: mx.array, visual: Visual | None, context: ForwardContext, cache: Cache, at: mx.array | None,
        pace: Pace,
    ) -> mx.array:  # fmt: skip
        assert isinstance(cache, MirroredCache), "a cache that make_cache() made"
        fields: dict[str, Any] = {"cache": cache.number, "paced": pace is not unpaced, "stepwise": context.stepwise}
        fields["lengths"] = None if context.lengths is None else context.counts
        fields["at"] = None if at is None else at.tolist()
        arrays = _tokens(tokens, visual)
        if context.positions.ndim == 3:  # else they go on from the cache's
            arrays["positions"] = np.array(context.positions)
        self.orders.give("pass", fields, arrays)
        hidden = self.split.run(self, tokens, visual, context, cache, at, pace)
        mx.eval(hidden, cache.held())
        return hidden


class PipelineModel(LeadingModel):
    """Rank 0's model in the pipeline split."""

    def _part(self, group: Group) -> Split:
        return PipelineSplit(self, group)


class TensorModel(LeadingModel):
    """Rank 0's model in the tensor split, whose table and head are divided too."""

    split: TensorSplit
    _passed: Callable[[], mx.array | None] = staticmethod(lambda: None)  # the last pass's hidden states, if they live

    def _part(self, group: Group) -> Split:
        return TensorSplit(self, group, self.config.vocab_size)

    def _pass(self, *given: Any) -> mx.array:
        hidden = super()._pass(*given)
        self._passed = weakref.ref(hidden)
        return hidden

    def embed(self, tokens: mx.array, visual: Visual | None = None, adapters: ActiveAdapters | None = None) -> mx.array:
        with self.orders.together():
            self.orders.give("embed", {"adapters": rows_of(adapters)}, _tokens(tokens, visual))
            x = self.split.embed(self, tokens, visual, adapters)
            mx.eval(x)
            return x

    def logits(self, hidden: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        """As `Model.logits`. The hidden states of the last pass are on every rank; others are sent."""
        with self.orders.together():
            arrays = {} if hidden is self._passed() else {"hidden": sent(hidden)}
            self.orders.give("logits", {"adapters": rows_of(adapters)}, arrays)
            found = self.split.logits(self, hidden, adapters)
            mx.eval(found)
            return found


def _tokens(tokens: mx.array, visual: Visual | None) -> dict[str, np.ndarray]:
    """The arrays of an order that say what to embed: token ids, and the places of images, whose embeddings are here."""
    arrays = {"tokens": np.array(tokens.astype(mx.int32))}
    if visual is not None:
        arrays |= {"rows": np.array(visual.rows), "columns": np.array(visual.columns)}
    return arrays


def library_limit(ranks: Sequence[Holding], dtype: mx.Dtype, kv: KVFormat) -> int:
    """Bytes of a library on the first rank, so that no rank's part of it takes more than its own model's would. The
    parts are taken as those of a whole window's keys and values, and states.
    """

    def cached(config: TextConfig) -> int:
        window = config.max_position_embeddings
        return kv_bytes(config, window, dtype.size, kv=kv) + state_bytes(config, dtype.size)

    own = cached(ranks[0].held)
    return min(library_bytes(rank.memory_limit) * own // cached(rank.held) for rank in ranks)
