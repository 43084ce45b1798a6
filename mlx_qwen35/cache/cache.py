"""Everything that belongs to one conversation (or one batch of them): keys and values, DeltaNet memory, lengths.

The model holds weights only, so any number of caches can use it, interleaved step by step.

A batch grows by columns: each call appends T columns to every row, of which the first lengths[i] of row i are tokens
and the rest are holes. Holes are never attended to, take no position, and leave no trace in the DeltaNet memory.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.layer import DeltaCache, KVCache, Place, Span
from mlx_qwen35.checkpoint.config import FULL, TextConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.gated_delta import DeltaState
from mlx_qwen35.model.layers import Rotary

if TYPE_CHECKING:
    from mlx_qwen35.engine.drafts.follower import Drafts


class Snapshot:
    """A place in a conversation to return to. Holds the DeltaNet memory; keys and values stay in the cache.

    Only when another branch of the conversation is about to overwrite some of its columns are those copied out.
    """

    def __init__(self, cache: "Cache"):
        self.place = cache.place
        self.memories = cache.memories()
        self.intact = cache.length  # columns that still lie in the cache as they were
        self.tail: list[tuple[mx.array, mx.array]] | None = None  # the columns after those
        self.drafts = cache.drafts.snapshot() if cache.drafts else None

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
        self.config, self.rotary, self.dtype = config, rotary, dtype
        self.batch = batch
        self.place = Place(0, (0,) * batch, (0,) * batch, None)
        self.drafts: Drafts | None = None  # the draft head's part, where one follows the conversation
        self._kv = [layer for layer in self.layers if isinstance(layer, KVCache)]
        self._delta = [layer for layer in self.layers if isinstance(layer, DeltaCache)]
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    @property
    def length(self) -> int:
        """Columns: tokens and holes."""
        return self.place.length

    @property
    def row_lengths(self) -> list[int]:
        """Tokens each row has read."""
        return list(self.place.row_lengths)

    @property
    def next_positions(self) -> list[int]:
        """The position of the next token of each row."""
        return list(self.place.next_positions)

    @property
    def real(self) -> mx.array | None:
        """(B, length) boolean, False at holes; None while there are none."""
        return self.place.real

    def reserve(self, T: int) -> None:
        """Say that T columns will come: room for all is made with the first, and nothing is copied on the way."""
        for layer in self._kv:
            layer.reserved = self.length + T
        if self.drafts:
            self.drafts.cache.reserve(T)

    @contextmanager
    def reading(
        self,
        T: int,
        lengths: Sequence[int] | None = None,
        positions: np.ndarray | None = None,
        stepwise: bool = False,
    ) -> Iterator[Span]:
        """Open the span of the next T columns; it counts once the block has ended, and leaves no trace if that raises.

        lengths: real tokens of each row, 0 to T; None when all are real. positions: (3, B, T) integers, where a row
        holds an image; None goes on counting. stepwise: so that `keep` can take some of the tokens back.
        """
        if lengths is not None and (len(lengths) != self.batch or not all(0 <= n <= T for n in lengths)):
            raise InputError(
                "lengths_invalid", f"lengths must be {self.batch} counts of 0 to {T} tokens, got {list(lengths)}"
            )
        self._protect(self.length)
        before = self.memories()
        counts = list(lengths or [T] * self.batch)
        after = self.place.after(T, counts)
        if positions is None:
            places = mx.array(np.array(self.next_positions, np.int32)[:, None] + np.arange(T, dtype=np.int32))
        else:
            places = mx.array(positions)
            highest = [positions[:, row, :n].max(initial=-1) + 1 for row, n in enumerate(counts)]
            following = (max(first, int(high)) for first, high in zip(self.next_positions, highest, strict=True))
            after = after._replace(next_positions=tuple(following))
        padded = None if lengths is None else mx.array(list(lengths), mx.int32)
        try:
            yield Span(self.length, padded, self.rotary.table(places), _mask(self.length, T, after.real), stepwise)
        except BaseException:
            for layer, memory in zip(self._delta, before, strict=True):
                layer.memory = memory
            raise
        self.place = after

    # --- going back ---

    def keep(self, place: Place, counts: Sequence[int]) -> None:
        """Go back to where only the first counts[i] tokens of row i were read after `place`.

        They must be text, and have come in one stepwise pass, of which no row had fewer than `counts` says.
        """
        for layer in self._delta:
            layer.keep(counts)
        self.place = place.after(max(counts), counts)
        if min(counts) < max(counts):
            self._clear_holes(place.length)
        self.close_holes()

    def go_back(self, place: Place, memories: Sequence[DeltaState]) -> None:
        """To where the cache was before a pass, with what `memories` gave then."""
        self.place = place
        for layer, memory in zip(self._delta, memories, strict=True):
            layer.memory, layer.steps = memory, None

    def _clear_holes(self, start: int) -> None:
        """Zeros where holes are, from column `start` on: infinity of a guess would survive its weight of 0."""
        real = self.real[:, None, start:, None]
        for layer in self._kv:
            for array in (layer.keys, layer.values):
                array[:, :, start : self.length] = mx.where(real, array[:, :, start : self.length], 0)

    def detach(self) -> None:
        """Let go of what `keep` has taken back: the memory that was kept is part of that of all tokens of the pass."""
        for layer in self._delta:
            layer.memory = DeltaState(*map(_copy, layer.memory))
        mx.eval([layer.memory for layer in self._delta])

    def close_holes(self) -> None:
        """Move each row's keys and values together, once rows that kept different numbers of tokens left many holes."""
        if self.real is None or self.length <= max(self.row_lengths) + KVCache.STEP:
            return
        self._protect(0)
        column = mx.arange(self.length)
        longest = max(self.row_lengths)
        order = mx.argsort(mx.where(self.real, column, column + self.length), axis=1)[:, None, :longest, None]
        for layer in self._kv:
            keys, values = (mx.take_along_axis(array, order, axis=2) for array in (layer.keys, layer.values))
            layer.extend(keys, values, 0)
        real = mx.arange(longest) < mx.array(self.row_lengths)[:, None]
        self.place = self.place._replace(length=longest, real=real)

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
            raise InputError(
                "snapshot_foreign", "a snapshot can only be restored into the cache that it was taken from"
            )
        if snapshot.tail:
            self._protect(snapshot.intact, but=snapshot)
            for layer, (keys, values) in zip(self._kv, snapshot.tail, strict=True):
                layer.extend(keys, values, snapshot.intact)
            snapshot.tail, snapshot.intact = None, snapshot.place.length
        for layer, memory in zip(self._delta, snapshot.memories, strict=True):
            layer.memory = memory
        self.place = snapshot.place
        self.drafts = snapshot.drafts.restored() if snapshot.drafts else None

    def _protect(self, start: int, but: Snapshot | None = None) -> None:
        for snapshot in list(self._snapshots):
            if snapshot.intact > start and snapshot is not but:
                snapshot.keep(self._kv, start)

    # --- what is in it ---

    def arrays(self) -> dict[str, mx.array]:
        """Every array by name, columns in use only: layers.3.keys, layers.3.values, layers.0.window, layers.0.state.

        Those of the draft head are left out: they change no text.
        """
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
        mx.eval([layer.arrays() for layer in self.layers], self.drafts.arrays() if self.drafts else [])

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
        own = sum(array.nbytes for layer in self.layers for array in layer.arrays())
        return own + sum(array.nbytes for array in (self.drafts.arrays() if self.drafts else ()))


def _mask(start: int, T: int, real: mx.array | None) -> mx.array | str | None:
    """Each token sees the real columns up to its own. A hole sees itself, so that no row of scores is empty."""
    if real is None:
        return None if T == 1 else "causal"
    column, row = mx.arange(start + T), start + mx.arange(T)[:, None]
    visible = (real[:, None] & (column <= row)) | (column == row)
    return visible[:, None]
