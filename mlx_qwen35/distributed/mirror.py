"""The cache of a conversation on rank 0, of which every other rank keeps its own part."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.kv_format import KVFormat
from mlx_qwen35.cache.layer import CachePosition, LayerCache
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.distributed.orders import Orders


class MirroredCache(Cache):
    """A cache whose operations every other rank repeats on its own cache of the same number.

    An operation is noted once it is done here, so what raises here is not repeated. The tokens of a pass are appended
    by the order of the pass.
    """

    number: int
    _orders: Orders

    def __init__(
        self, orders: Orders, config: TextConfig, dtype: mx.Dtype, kv: KVFormat, adapters: Sequence[str]
    ):  # fmt: skip
        """adapters: of each of its rows, see `Cache`."""
        with orders.together():
            super().__init__(config, dtype, len(adapters), kv, adapters)
            self._orders, self.number = orders, orders.number(self)
            orders.note("new", self.number, list(self.adapters))

    def _like(self, layers: list[LayerCache], position: CachePosition) -> Cache:
        made = super()._like(layers, position)
        assert isinstance(made, MirroredCache)
        made._orders, made.number = self._orders, self._orders.number(made)
        return made

    def copy(self) -> Cache:
        with self._orders.together():
            made = super().copy()
            self._orders.note("copy", _number(made), self.number)
            return made

    def select(self, rows: Sequence[int]) -> Cache:
        with self._orders.together():
            made = super().select(rows)
            self._orders.note("select", _number(made), self.number, list(rows))
            return made

    def with_rows_of(self, others: Sequence[Cache]) -> Cache:
        with self._orders.together():
            made = super().with_rows_of(others)
            self._orders.note("join", _number(made), [self.number, *map(_number, others)])
            return made

    def reserve(self, T: int) -> None:
        with self._orders.together():
            super().reserve(T)
            self._orders.note("reserve", self.number, T)

    def rollback(self, position: CachePosition, counts: Sequence[int]) -> None:
        with self._orders.together():
            super().rollback(position, counts)
            self._orders.note("rollback", self.number, position, list(counts))

    def assign(self, other: Cache) -> None:
        with self._orders.together():
            super().assign(other)
            self._orders.note("assign", self.number, _number(other))

    def compact(self) -> None:
        with self._orders.together():
            super().compact()
            self._orders.note("compact", self.number)

    def trim(self) -> None:
        with self._orders.together():
            super().trim()
            self._orders.note("trim", self.number)

    def first_not_finite(self, row: int) -> int | None:
        """The first layer of the model, on whatever rank, with NaN or infinity in this row's tokens."""
        with self._orders.together():
            own = super().first_not_finite(row)
            answers = self._orders.ask("first_not_finite", cache=self.number, row=row)
        return min((n for n in (own, *(answer["layer"] for answer in answers)) if n is not None), default=None)


def _number(cache: Cache) -> int:
    assert isinstance(cache, MirroredCache), "every cache of a model over several machines has a number"
    return cache.number
