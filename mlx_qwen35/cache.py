"""Everything that belongs to one conversation (or one batch of them): keys and values, DeltaNet memory, lengths.

The model holds weights only, so any number of caches can use it, interleaved step by step.

A batch grows by columns: each call appends T columns to every row, of which the first lengths[i] of row i are tokens
and the rest are holes. Holes are never attended to, take no position, and leave no trace in the DeltaNet memory.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.config import FULL, TextConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.gated_delta import DeltaState
from mlx_qwen35.layers import Rotary


class Span(NamedTuple):
    """The columns that one forward pass reads."""

    start: int  # columns already there
    lengths: mx.array | None  # (B,) real tokens of each row in this pass; None: all
    rotary: tuple[mx.array, mx.array]  # cos, sin of their positions
    mask: mx.array | str | None  # for attention: (B, 1, T, start + T) boolean, "causal", or None for one token


class KVCache:
    """Keys (normed and rotated) and values of one attention layer: (B, Hk, capacity, D), capacity in steps of STEP."""

    STEP = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.reserved = 0  # columns that are known to come

    def extend(self, keys: mx.array, values: mx.array, start: int) -> tuple[mx.array, mx.array]:
        """Write (B, Hk, T, D) at column `start` and return all columns up to there."""
        end = start + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self.keys, self.values = (
                self._grown(self.keys, keys, start, end),
                self._grown(self.values, values, start, end),
            )
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def arrays(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]

    def _grown(self, old: mx.array | None, like: mx.array, start: int, end: int) -> mx.array:
        capacity = -(-max(end, self.reserved) // self.STEP) * self.STEP
        B, H, _, D = like.shape
        if old is None or start == 0:
            return mx.zeros((B, H, capacity, D), like.dtype)
        return mx.concatenate([old[:, :, :start], mx.zeros((B, H, capacity - start, D), like.dtype)], axis=2)


class DeltaCache:
    """Window and state of one DeltaNet layer. Replaced as a whole by each pass, never changed in place."""

    def __init__(self, memory: DeltaState):
        self.memory = memory

    def arrays(self) -> list[mx.array]:
        return list(self.memory)


class Snapshot:
    """A place in a conversation to return to. Holds the DeltaNet memory; keys and values stay in the cache.

    Only when another branch of the conversation is about to overwrite some of its columns are those copied out.
    """

    def __init__(self, cache: "Cache"):
        self.length, self.row_lengths, self.real = cache.length, tuple(cache.row_lengths), cache.real
        self.next_positions = tuple(cache.next_positions)
        self.memories = cache.memories()
        self.intact = cache.length  # columns that still lie in the cache as they were
        self.tail: list[tuple[mx.array, mx.array]] | None = None  # the columns after those

    def keep(self, layers: list[KVCache], start: int) -> None:
        """Copy out the columns from `start` on, which the cache is about to overwrite."""
        kept = [[layer.keys[:, :, start : self.intact], layer.values[:, :, start : self.intact]] for layer in layers]
        if self.tail:
            kept = [
                [mx.concatenate(pair, 2) for pair in zip(new, old, strict=True)]
                for new, old in zip(kept, self.tail, strict=True)
            ]
        self.tail = [(_copy(keys), _copy(values)) for keys, values in kept]
        mx.eval(self.tail)
        self.intact = start


def _copy(array: mx.array) -> mx.array:
    """The array in memory of its own: a plain slice keeps the whole cache buffer shared, and so copied on write."""
    return mx.concatenate([array, array[:, :, :0]], axis=2)


class Cache:
    """The memory of B rows that are read together; make one with `model.make_cache()`."""

    def __init__(self, config: TextConfig, rotary: Rotary, dtype: mx.Dtype, batch: int = 1):
        window = (batch, config.linear_conv_kernel_dim - 1, config.conv_dim)
        state = (batch, config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim)
        empty = DeltaState(mx.zeros(window, dtype), mx.zeros(state, mx.float32))
        self.layers = [KVCache() if kind == FULL else DeltaCache(empty) for kind in config.layer_types]
        self.rotary = rotary
        self.batch = batch
        self.length = 0  # columns: tokens and holes
        self.row_lengths = [0] * batch  # tokens each row has read
        self.next_positions = [0] * batch  # of the next token of each row; an image takes fewer than it has tokens
        self.real: mx.array | None = None  # (B, length) boolean, False at holes; None while there are none
        self._kv = [layer for layer in self.layers if isinstance(layer, KVCache)]
        self._delta = [layer for layer in self.layers if isinstance(layer, DeltaCache)]
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    def reserve(self, T: int) -> None:
        """Say that T columns will come: room for all is made with the first, and nothing is copied on the way."""
        for layer in self._kv:
            layer.reserved = self.length + T

    @contextmanager
    def reading(
        self, T: int, lengths: Sequence[int] | None = None, positions: np.ndarray | None = None
    ) -> Iterator[Span]:
        """Open the span of the next T columns; it counts once the block has ended, and leaves no trace if that raises.

        lengths: real tokens of each row, 0 to T; None when all are real. positions: (3, B, T) integers, where a row
        holds an image; None goes on counting.
        """
        if lengths is not None and (len(lengths) != self.batch or not all(0 <= n <= T for n in lengths)):
            raise InputError(f"lengths must be {self.batch} counts of 0 to {T} tokens, got {list(lengths)}")
        self._protect(self.length)
        before = self.memories()
        real = self._real_after(T, lengths)
        counts = list(lengths or [T] * self.batch)
        if positions is None:
            places = mx.array(np.array(self.next_positions, np.int32)[:, None] + np.arange(T, dtype=np.int32))
            following = [first + n for first, n in zip(self.next_positions, counts, strict=True)]
        else:
            places = mx.array(positions)
            highest = [positions[:, row, :n].max(initial=-1) + 1 for row, n in enumerate(counts)]
            following = [max(first, int(high)) for first, high in zip(self.next_positions, highest, strict=True)]
        padded = None if lengths is None else mx.array(list(lengths), mx.int32)
        try:
            yield Span(self.length, padded, self.rotary.table(places), _mask(self.length, T, real))
        except BaseException:
            for layer, memory in zip(self._delta, before, strict=True):
                layer.memory = memory
            raise
        self.real = real
        self.length += T
        self.row_lengths = [n + m for n, m in zip(self.row_lengths, counts, strict=True)]
        self.next_positions = following

    def _real_after(self, T: int, lengths: Sequence[int] | None) -> mx.array | None:
        if self.real is None and (lengths is None or min(lengths) == T):
            return None
        before = mx.ones((self.batch, self.length), mx.bool_) if self.real is None else self.real
        counts = mx.array([T] * self.batch if lengths is None else list(lengths))
        return mx.concatenate([before, mx.arange(T) < counts[:, None]], axis=1)

    # --- going back ---

    def memories(self) -> list[DeltaState]:
        return [layer.memory for layer in self._delta]

    def snapshot(self) -> Snapshot:
        """Remember this place. Costs references to the DeltaNet memory (about 50 MB for the 4B once it moves on)."""
        snapshot = Snapshot(self)
        self._snapshots.add(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or forward again) to where a snapshot of this cache was taken."""
        if snapshot not in self._snapshots:
            raise InputError("a snapshot can only be restored into the cache that it was taken from")
        if snapshot.tail:
            self._protect(snapshot.intact, but=snapshot)
            for layer, (keys, values) in zip(self._kv, snapshot.tail, strict=True):
                layer.extend(keys, values, snapshot.intact)
            snapshot.tail, snapshot.intact = None, snapshot.length
        for layer, memory in zip(self._delta, snapshot.memories, strict=True):
            layer.memory = memory
        self.length, self.row_lengths, self.real = snapshot.length, list(snapshot.row_lengths), snapshot.real
        self.next_positions = list(snapshot.next_positions)

    def _protect(self, start: int, but: Snapshot | None = None) -> None:
        for snapshot in list(self._snapshots):
            if snapshot.intact > start and snapshot is not but:
                snapshot.keep(self._kv, start)

    # --- what is in it ---

    def arrays(self) -> dict[str, mx.array]:
        """Every array by name, columns in use only: layers.3.keys, layers.3.values, layers.0.window, layers.0.state."""
        named = {} if self.real is None else {"real": self.real}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, DeltaCache):
                named |= {f"layers.{i}.window": layer.memory.window, f"layers.{i}.state": layer.memory.state}
            elif layer.keys is not None:
                named[f"layers.{i}.keys"] = layer.keys[:, :, : self.length]
                named[f"layers.{i}.values"] = layer.values[:, :, : self.length]
        return named

    def evaluate(self) -> None:
        """Compute what is pending, so that no graph is held."""
        mx.eval([layer.arrays() for layer in self.layers])

    def first_not_finite(self, row: int) -> int | None:
        """The first layer whose memory of this row holds NaN or infinity. Columns that are holes do not count."""
        for i, layer in enumerate(self.layers):
            arrays = [array[row] for array in layer.arrays()]
            if isinstance(layer, KVCache):
                arrays = [array[:, : self.length] for array in arrays]
                if self.real is not None:
                    arrays = [mx.where(self.real[row, :, None], array, 0) for array in arrays]
            if not all(mx.isfinite(array).all().item() for array in arrays):
                return i
        return None

    @property
    def nbytes(self) -> int:
        """Bytes in memory, unused capacity included."""
        return sum(array.nbytes for layer in self.layers for array in layer.arrays())


def _mask(start: int, T: int, real: mx.array | None) -> mx.array | str | None:
    """Each token sees the real columns up to its own. A hole sees itself, so that no row of scores is empty."""
    if real is None:
        return None if T == 1 else "causal"
    column, row = mx.arange(start + T), start + mx.arange(T)[:, None]
    visible = (real[:, None] & (column <= row)) | (column == row)
    return visible[:, None]
