"""What every rank but 0 does: obey orders, with a model of its share, until rank 0 has ended."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import CachePosition
from mlx_qwen35.distributed.channel import Order
from mlx_qwen35.distributed.orders import adapters_of, received
from mlx_qwen35.distributed.split import Split
from mlx_qwen35.distributed.tensor import TensorSplit
from mlx_qwen35.engine.engine import CLEAR_EVERY
from mlx_qwen35.model.decoder import unpaced
from mlx_qwen35.model.model import Model, Visual
from mlx_qwen35.model.pace import Pace


class ObeyingRank:
    """A rank that is not 0: its caches by number, and the hidden states of the last pass.

    Rank 0 has checked what it orders: nothing is checked here.
    """

    def __init__(self, model: Model, split: Split, first_layer: int = 0):
        """model: of the rank's share, from load_model. first_layer: the model's number of its first layer."""
        self.model, self.split, self.first_layer = model, split, first_layer
        self.caches: dict[int, Cache] = {}
        self._hidden = mx.zeros(0)
        self._passes = 0

    def obey(self, order: Order) -> Mapping[str, Any] | None:
        """Do what an order says, and what was noted before it; its answer, if it wants one."""
        obeyed: dict[str, Callable[[Order], Mapping[str, Any] | None]] = {
            "pass": self._pass, "embed": self._embed, "logits": self._logits, "keep": lambda order: None,
            "first_not_finite": self._first_not_finite, "chunk": self._chunk,
        }  # fmt: skip
        for name, number, *values in order.fields["noted"]:
            self._note(name, number, *values)
        return obeyed[order.name](order)

    # --- what ranks compute together ---

    def _pass(self, order: Order) -> None:
        fields, cache = order.fields, self.caches[order.fields["cache"]]
        tokens, visual = self._given(order)
        at = None if fields["at"] is None else mx.array(fields["at"])
        pace = Pace() if fields["paced"] else unpaced
        given = (tokens.shape[1], fields["lengths"], order.arrays.get("positions"), fields["stepwise"])
        with cache.forward(*given, self.model.active(cache)) as context:
            self._hidden = self.split.run(self.model, tokens, visual, context, cache, at, pace)
            mx.eval(self._hidden, cache.held())
        self._passes += 1
        if fields["paced"] or self._passes % CLEAR_EVERY == 0:
            mx.clear_cache()

    def _embed(self, order: Order) -> None:
        assert isinstance(self.split, TensorSplit)
        adapters = adapters_of(order.fields["adapters"], self.model.adapters)
        mx.eval(self.split.embed(self.model, *self._given(order), adapters))

    def _logits(self, order: Order) -> None:
        assert isinstance(self.split, TensorSplit)
        given = order.arrays.get("hidden")
        hidden = self._hidden if given is None else received(given, self.model.dtype)
        adapters = adapters_of(order.fields["adapters"], self.model.adapters)
        mx.eval(self.split.logits(self.model, hidden, adapters))

    def _given(self, order: Order) -> tuple[mx.array, Visual | None]:
        """The tokens of an order, and zeros at the places of images, whose embeddings rank 0 adds."""
        arrays = {name: mx.array(array) for name, array in order.arrays.items()}
        if "rows" not in arrays:
            return arrays["tokens"], None
        zeros = mx.zeros((len(arrays["rows"]), self.model.config.hidden_size), self.model.dtype)
        return arrays["tokens"], Visual(arrays["rows"], arrays["columns"], zeros)

    def _first_not_finite(self, order: Order) -> Mapping[str, Any]:
        found = self.caches[order.fields["cache"]].first_not_finite(order.fields["row"])
        return {"layer": None if found is None else self.first_layer + found}

    def _chunk(self, order: Order) -> Mapping[str, Any]:
        return {"chunk": self.model.chunk(order.fields["context"])}

    # --- caches ---

    def _note(self, name: str, number: int, *values: Any) -> None:
        """Repeat what rank 0 did with its cache of this number, or how it made it."""
        if name == "drop":
            self.caches.pop(number, None)  # an operation that failed on rank 0 was not noted
        elif name in ("new", "copy", "select", "join"):
            self.caches[number] = self._made(name, *values)
        else:
            self._change(self.caches[number], name, *values)

    def _made(self, *note: Any) -> Cache:
        match note:
            case "new", adapters:
                return Cache(self.model.held, self.model.dtype, len(adapters), self.model.kv, adapters)
            case "copy", source:
                return self.caches[source].copy()
            case "select", source, rows:
                return self.caches[source].select(rows)
        first, *others = (self.caches[source] for source in note[1])
        return first.with_rows_of(others)

    def _change(self, cache: Cache, *note: Any) -> None:
        match note:
            case "rollback", position, counts:
                cache.rollback(CachePosition(*map(tuple, position)), counts)
            case "assign", other:
                cache.assign(self.caches[other])
            case "reserve", T:
                cache.reserve(T)
            case ("compact",):
                cache.compact()
            case ("trim",):
                cache.trim()
