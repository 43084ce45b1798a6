"""The cache of one conversation, or of several in the rows of a batch: keys and values, DeltaNet states, positions.

The model holds weights only, so any number of caches can share it. Each row has its own number of tokens: a pass over
(B, T) tokens appends the first lengths[i] of row i, and what is padding leaves no trace.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.kv_format import UNQUANTIZED, KVFormat
from mlx_qwen35.cache.layer import CachePosition, DeltaCache, ForwardContext, KVCache, LayerCache
from mlx_qwen35.checkpoint.config import FULL, TextConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.gated_delta import DeltaState
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.values import shown


class Follower(Protocol):
    """The draft head's own cache, which advances and returns with the model's."""

    def reserve(self, T: int) -> None: ...
    def copy(self) -> "Follower": ...
    def arrays(self) -> list[mx.array]: ...


class Snapshot:
    """A position in a conversation to return to, in any cache of the same model.

    It shares the arrays of the cache that it was taken from. That cache goes on in the same memory. A cache that goes
    on elsewhere from here copies its columns once, at its first token. Made by `Cache.snapshot`.
    """

    def __init__(self, cache: "Cache"):
        self._cache = cache.copy()

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row."""
        return self._cache.row_lengths

    @property
    def nbytes(self) -> int:
        """Bytes in memory, those included that it shares with caches and other snapshots."""
        return self._cache.nbytes

    def held(self) -> list[mx.array]:
        """Every array in memory, the draft head's included."""
        return self._cache.held()

    def cache(self) -> "Cache":
        """A cache that goes on from here."""
        return self._cache.copy()

    def compact(self) -> None:
        """Move the states to memory of their own, and free the columns behind those in use."""
        self._cache.compact()

    def trim(self) -> None:
        """Free the columns that neither it nor a cache or snapshot that shares its arrays uses."""
        self._cache.trim()

    @property
    def ends_its_arrays(self) -> bool:
        """Whether a cache that goes on from here need not copy its columns first."""
        rows = [row for layer in self._cache.layers if isinstance(layer, KVCache) for row in layer.rows]
        return all(other.claimed <= row.length for row in rows for other in row.buffers.rows)


class Cache:
    """The cache of B rows. Made by `model.make_cache()`."""

    def __init__(
        self, config: TextConfig, dtype: mx.Dtype, batch: int = 1, kv: KVFormat = UNQUANTIZED,
        adapters: Sequence[str] | None = None,
    ):  # fmt: skip
        """adapters: the adapter of each row, "" for none. What a row holds is of use to its adapter alone."""
        Hk, head_dim = config.num_key_value_heads, config.head_dim
        conv = (batch, config.linear_conv_kernel_dim - 1, config.conv_dim)
        recurrent = (batch, config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim)
        empty = DeltaState(mx.zeros(conv, dtype), mx.zeros(recurrent, mx.float32))
        mx.eval(empty)  # a lazy array can be computed in no thread but the one that made it
        self.config, self.dtype, self.kv = config, dtype, kv
        self.layers: list[LayerCache] = [
            KVCache.empty(batch, Hk, head_dim, dtype, kv) if kind == FULL else DeltaCache(empty)
            for kind in config.layer_types
        ]
        self.position = CachePosition((0,) * batch, (0,) * batch)
        self.adapters = ("",) * batch if adapters is None else tuple(adapters)
        self.follower: Follower | None = None  # the draft head's cache, if tokens are drafted

    @property
    def batch(self) -> int:
        return len(self.position.lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.position.lengths)

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row."""
        return list(self.position.lengths)

    @property
    def next_positions(self) -> list[int]:
        """The next token's position in each row."""
        return list(self.position.next_positions)

    def reserve(self, T: int) -> None:
        """Preallocate room for T more tokens of each row."""
        for layer in self.layers:
            layer.reserve([T] * self.batch)
        if self.follower:
            self.follower.reserve(T)

    @contextmanager
    def forward(
        self,
        T: int,
        lengths: Sequence[int] | None = None,
        positions: np.ndarray | None = None,
        stepwise: bool = False,
        adapters: ActiveAdapters | None = None,
    ) -> Iterator[ForwardContext]:
        """Append T columns. They count when the block ends; if it raises, the cache is as before.

        lengths: tokens of each row, 0 to T; the rest is padding. None: no padding. positions: (3, B, T) integers, for
        images and videos; None continues from `next_positions`. stepwise: store DeltaNet states for `rollback`.
        """
        if lengths is not None and (len(lengths) != self.batch or not all(0 <= n <= T for n in lengths)):
            raise InputError(
                "lengths_invalid", f"lengths must be {self.batch} counts of 0 to {T} tokens, got {list(lengths)}"
            )
        counts = (T,) * self.batch if lengths is None else tuple(lengths)
        after = self.position.after(counts)
        if positions is None:
            table = mx.array(np.array(self.next_positions, np.int32)[:, None] + np.arange(T, dtype=np.int32))
        else:
            table = mx.array(positions)
            highest = [positions[:, row, :n].max(initial=-1) + 1 for row, n in enumerate(counts)]
            following = (max(first, int(high)) for first, high in zip(self.next_positions, highest, strict=True))
            after = after._replace(next_positions=tuple(following))
        padded = None if lengths is None else mx.array(counts, mx.int32)
        before = [layer.copy() for layer in self.layers]
        try:
            for layer in self.layers:
                layer.reserve(counts)
            yield ForwardContext(counts, padded, table, stepwise, adapters)
        except BaseException:
            self.layers = before
            mx.async_eval(self.held())  # what the pass wrote behind the columns in use is a graph of this thread
            raise
        self.position = after

    def rollback(self, position: CachePosition, counts: Sequence[int]) -> None:
        """Keep only the first counts[i] tokens of row i of the last pass, which began at `position`.

        The pass must have been stepwise and of text, with at least counts[i] tokens in row i.
        """
        fed = [after - before for after, before in zip(self.position.lengths, position.lengths, strict=True)]
        self.layers, self.position = [layer.rollback(fed, counts) for layer in self.layers], position.after(counts)

    # --- rows ---

    def select(self, rows: Sequence[int]) -> "Cache":
        """A cache of these rows alone, without the draft head's."""
        position = CachePosition(*(tuple(own[row] for row in rows) for own in self.position))
        selected = self._like([layer.select(rows) for layer in self.layers], position)
        selected.adapters = tuple(self.adapters[row] for row in rows)
        return selected

    @staticmethod
    def joined(caches: Sequence["Cache"]) -> "Cache":
        """A cache of the rows of several caches of one model, without the draft head's."""
        return caches[0].with_rows_of(caches[1:])

    def with_rows_of(self, others: Sequence["Cache"]) -> "Cache":
        """A cache of these rows and, behind them, those of other caches of the model, without the draft head's."""
        caches = [self, *others]
        layers = [type(own[0]).joined(own) for own in zip(*(cache.layers for cache in caches), strict=True)]
        positions = zip(*(cache.position for cache in caches), strict=True)
        joined = self._like(layers, CachePosition(*(tuple(chain.from_iterable(own)) for own in positions)))
        joined.adapters = tuple(chain.from_iterable(cache.adapters for cache in caches))
        return joined

    def _like(self, layers: list[LayerCache], position: CachePosition) -> "Cache":
        cache = self.__class__.__new__(self.__class__)
        cache.config, cache.dtype, cache.kv = self.config, self.dtype, self.kv
        cache.layers, cache.position, cache.follower = layers, position, None
        cache.adapters = self.adapters
        return cache

    # --- going back ---

    def copy(self) -> "Cache":
        """A cache with the same content, which goes on apart. It shares memory until one of the two would overwrite
        what the other holds.
        """
        cache = self._like([layer.copy() for layer in self.layers], self.position)
        cache.follower = self.follower.copy() if self.follower else None
        return cache

    def assign(self, other: "Cache") -> None:
        """Hold what another cache of this model holds. The other must not be used any more."""
        self.layers, self.position, self.follower = other.layers, other.position, other.follower
        self.adapters = other.adapters

    def snapshot(self) -> Snapshot:
        """A snapshot of this position. Costs references to the DeltaNet states (50 MB for the 4B once they change)."""
        return Snapshot(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Return to the position of a snapshot of any cache of this model with as many rows."""
        if not isinstance(snapshot, Snapshot):
            raise InputError("option_invalid", f"restore takes what cache.snapshot() gives, got {shown(snapshot)}")
        held = snapshot._cache
        own, other = ((c.config, c.dtype, c.kv, c.batch, c.adapters) for c in (self, held))
        if own != other:
            raise InputError(
                "snapshot_foreign",
                "a snapshot can only be restored into a cache of the same model with as many rows; it is of "
                f"{_form(held)}, the cache of {_form(self)}",
            )
        self.assign(held.copy())

    def compact(self) -> None:
        """Free the memory that is not in use: room for tokens, and the states of rejected tokens."""
        for layer in self.layers:
            layer.compact()
        self.evaluate()

    def trim(self) -> None:
        """Free the columns that neither it nor a cache or snapshot that shares its arrays uses."""
        for layer in self.layers:
            if isinstance(layer, KVCache):
                layer.compact()

    # --- contents ---

    def arrays(self, row: int = 0) -> dict[str, mx.array]:
        """The arrays of a row by name, tokens in use only: layers.3.keys, layers.3.values, layers.0.conv_state,
        layers.0.recurrent_state, each with a first axis of 1. The draft head's arrays are left out, since they change
        no text.
        """
        return {f"layers.{i}.{name}": a for i, layer in enumerate(self.layers) for name, a in layer.view(row).items()}

    def evaluate(self) -> None:
        """Evaluate every array, so that no graph is held."""
        mx.eval(self.held())

    def held(self) -> list[mx.array]:
        """Every array in memory, the draft head's included."""
        arrays = [array for layer in self.layers for array in layer.arrays()]
        return arrays + (self.follower.arrays() if self.follower else [])

    def first_not_finite(self, row: int) -> int | None:
        """The first layer with NaN or infinity in this row's tokens; None if there is none."""
        for i, layer in enumerate(self.layers):
            if not all(mx.isfinite(array).all().item() for array in layer.view(row).values()):
                return i
        return None

    @property
    def nbytes(self) -> int:
        """Bytes in memory, unused capacity included."""
        return sum(array.nbytes for array in self.held())


def _form(cache: Cache) -> str:
    kv = f", keys and values in {cache.kv.name} bit" if cache.kv.quantized else ""
    adapters = "".join(f", adapter {name}" for name in sorted(set(cache.adapters)) if name)
    return f"{cache.batch} rows in {cache.dtype}{kv}{adapters}"
