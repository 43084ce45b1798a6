"""The state of one conversation, or of one batch: keys and values, DeltaNet states, lengths.

The model holds weights only, so any number of caches can share it, step by step.

A batch grows by columns: each forward pass appends T columns to every row. The first lengths[i] columns of row i are
tokens, the rest padding. Padding is never attended to, takes no position, and changes no DeltaNet state.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.layer import CachePosition, DeltaCache, ForwardContext, KVCache, LayerCache
from mlx_qwen35.checkpoint.config import FULL, TextConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.gated_delta import DeltaState


class Follower(Protocol):
    """The draft head's own cache, which advances and returns with the model's."""

    def reserve(self, T: int) -> None: ...
    def snapshot(self) -> Callable[[], "Follower"]: ...  # a function that restores the follower and returns it
    def arrays(self) -> list[mx.array]: ...


class Snapshot:
    """A position in a conversation to return to. It holds the DeltaNet states; keys and values stay in the cache.

    Columns are copied out of the cache only when another branch of the conversation overwrites them.
    """

    def __init__(self, cache: "Cache"):
        self.position = cache.position
        self.states = cache.states()
        self.intact = cache.length  # columns that the cache still holds unchanged
        self.tail: list[tuple[mx.array, mx.array]] | None = None  # keys and values of the columns after them
        self.restore_follower = cache.follower.snapshot() if cache.follower else None

    def detach(self, layers: list[KVCache], start: int) -> None:
        """Copy out the columns from `start` on, which the cache is about to overwrite."""
        columns = [[array[:, :, start : self.intact] for array in layer.arrays()] for layer in layers]
        if self.tail:
            columns = [
                [mx.concatenate(list(pair), axis=2) for pair in zip(new, old, strict=True)]
                for new, old in zip(columns, self.tail, strict=True)
            ]
        self.tail = [(_copy(keys), _copy(values)) for keys, values in columns]
        mx.eval(self.tail)
        self.intact = start


def _copy(array: mx.array) -> mx.array:
    """The array in memory of its own. A slice would share the cache's buffer, which is then copied when written to."""
    return mx.concatenate([array, array[:, :, :0]], axis=2)


class Cache:
    """The cache of a batch of B rows. Made by `model.make_cache()`."""

    def __init__(self, config: TextConfig, dtype: mx.Dtype, batch: int = 1):
        conv = (batch, config.linear_conv_kernel_dim - 1, config.conv_dim)
        recurrent = (batch, config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim)
        empty = DeltaState(mx.zeros(conv, dtype), mx.zeros(recurrent, mx.float32))
        layers = (KVCache() if kind == FULL else DeltaCache(empty) for kind in config.layer_types)
        self.layers: list[LayerCache] = list(layers)
        self.config, self.dtype = config, dtype
        self.batch = batch
        self.position = CachePosition(0, (0,) * batch, (0,) * batch, None)
        self.follower: Follower | None = None  # the draft head's cache, if tokens are drafted
        self._kv = [layer for layer in self.layers if isinstance(layer, KVCache)]
        self._delta = [layer for layer in self.layers if isinstance(layer, DeltaCache)]
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    @property
    def length(self) -> int:
        """Columns: tokens and padding."""
        return self.position.length

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row."""
        return list(self.position.row_lengths)

    @property
    def next_positions(self) -> list[int]:
        """The next token's position in each row."""
        return list(self.position.next_positions)

    @property
    def mask(self) -> mx.array | None:
        """(B, length) boolean, False at padding. None: no padding."""
        return self.position.mask

    def reserve(self, T: int) -> None:
        """Preallocate room for T more columns."""
        for layer in self._kv:
            layer.reserved = self.length + T
        if self.follower:
            self.follower.reserve(T)

    @contextmanager
    def forward(
        self,
        T: int,
        lengths: Sequence[int] | None = None,
        positions: np.ndarray | None = None,
        stepwise: bool = False,
    ) -> Iterator[ForwardContext]:
        """Append T columns. They count when the block ends; if it raises, the cache is as before.

        lengths: tokens of each row, 0 to T; the rest is padding. None: no padding. positions: (3, B, T) integers, for
        images and videos; None continues from `next_positions`. stepwise: store DeltaNet states for `rollback`.
        """
        if lengths is not None and (len(lengths) != self.batch or not all(0 <= n <= T for n in lengths)):
            raise InputError(
                "lengths_invalid", f"lengths must be {self.batch} counts of 0 to {T} tokens, got {list(lengths)}"
            )
        self._protect(self.length)
        before = self.states()
        counts = list(lengths or [T] * self.batch)
        after = self.position.after(T, counts)
        if positions is None:
            table = mx.array(np.array(self.next_positions, np.int32)[:, None] + np.arange(T, dtype=np.int32))
        else:
            table = mx.array(positions)
            highest = [positions[:, row, :n].max(initial=-1) + 1 for row, n in enumerate(counts)]
            following = (max(first, int(high)) for first, high in zip(self.next_positions, highest, strict=True))
            after = after._replace(next_positions=tuple(following))
        padded = None if lengths is None else mx.array(list(lengths), mx.int32)
        try:
            yield ForwardContext(self.length, padded, table, _attention_mask(self.length, T, after.mask), stepwise)
        except BaseException:
            self.rewind(self.position, before)
            raise
        self.position = after

    # --- going back ---

    def rollback(self, position: CachePosition, counts: Sequence[int]) -> None:
        """Keep only the first counts[i] tokens of row i of the last pass, which began at `position`.

        The pass must have been stepwise and of text, with at least counts[i] tokens in row i.
        """
        for layer in self._delta:
            layer.rollback(counts)
        self.position = position.after(max(counts), counts)
        if min(counts) < max(counts):
            self._zero_padding(position.length)
        self.compact()

    def rewind(self, position: CachePosition, states: Sequence[DeltaState]) -> None:
        """Undo the last pass, which began at `position` with these DeltaNet states."""
        self.position = position
        for layer, state in zip(self._delta, states, strict=True):
            layer.state, layer.steps = state, None

    def _zero_padding(self, start: int) -> None:
        """Zero the padding from column `start` on. A rejected token may hold infinity, and 0 x infinity is NaN."""
        assert self.mask is not None
        tokens = self.mask[:, None, start:, None]
        for layer in self._kv:
            for array in layer.arrays():
                array[:, :, start : self.length] = mx.where(tokens, array[:, :, start : self.length], 0)

    def detach(self) -> None:
        """Copy the DeltaNet states, which share memory with those of rejected tokens, so that the latter are freed."""
        for layer in self._delta:
            layer.state = DeltaState(*map(_copy, layer.state))
        mx.eval([layer.state for layer in self._delta])

    def compact(self) -> None:
        """Remove padding between tokens, once there are more than KVCache.STEP columns of it."""
        if self.mask is None or self.length <= max(self.row_lengths) + KVCache.STEP:
            return
        self._protect(0)
        column = mx.arange(self.length)
        longest = max(self.row_lengths)
        order = mx.argsort(mx.where(self.mask, column, column + self.length), axis=1)[:, None, :longest, None]
        for layer in self._kv:
            keys, values = (mx.take_along_axis(array, order, axis=2) for array in layer.arrays())
            layer.extend(keys, values, 0)
        mask = mx.arange(longest) < mx.array(self.row_lengths)[:, None]
        self.position = self.position._replace(length=longest, mask=mask)

    def states(self) -> list[DeltaState]:
        """The state of each DeltaNet layer."""
        return [layer.state for layer in self._delta]

    def snapshot(self) -> Snapshot:
        """A snapshot of this position. Costs references to the DeltaNet states (50 MB for the 4B once they change)."""
        snapshot = Snapshot(self)
        self._snapshots.add(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Return to the position of a snapshot of this cache, backward or forward."""
        if snapshot not in self._snapshots:
            raise InputError(
                "snapshot_foreign", "a snapshot can only be restored into the cache that it was taken from"
            )
        if snapshot.tail:
            self._protect(snapshot.intact, but=snapshot)
            for layer, (keys, values) in zip(self._kv, snapshot.tail, strict=True):
                layer.extend(keys, values, snapshot.intact)
            snapshot.tail, snapshot.intact = None, snapshot.position.length
        self.rewind(snapshot.position, snapshot.states)
        self.follower = snapshot.restore_follower() if snapshot.restore_follower else None

    def _protect(self, start: int, but: Snapshot | None = None) -> None:
        for snapshot in list(self._snapshots):
            if snapshot.intact > start and snapshot is not but:
                snapshot.detach(self._kv, start)

    # --- contents ---

    def arrays(self) -> dict[str, mx.array]:
        """Every array by name, columns in use only: mask, layers.3.keys, layers.3.values, layers.0.conv_state,
        layers.0.recurrent_state. The draft head's arrays are left out, since they change no text.
        """
        named = {} if self.mask is None else {"mask": self.mask}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, DeltaCache):
                named |= {f"layers.{i}.{name}": array for name, array in layer.state._asdict().items()}
            else:
                for name, array in zip(("keys", "values"), layer.arrays(), strict=False):
                    named[f"layers.{i}.{name}"] = array[:, :, : self.length]
        return named

    def evaluate(self) -> None:
        """Evaluate every array, so that no graph is held."""
        mx.eval([layer.arrays() for layer in self.layers], self.follower.arrays() if self.follower else [])

    def first_not_finite(self, row: int) -> int | None:
        """The first layer with NaN or infinity in this row's tokens; None if there is none."""
        for i, layer in enumerate(self.layers):
            arrays = [array[row] for array in layer.arrays()]
            if isinstance(layer, KVCache):
                arrays = [array[:, : self.length] for array in arrays]
                if self.mask is not None:
                    arrays = [mx.where(self.mask[row, :, None], array, 0) for array in arrays]
            if not all(mx.isfinite(array).all().item() for array in arrays):
                return i
        return None

    @property
    def nbytes(self) -> int:
        """Bytes in memory, unused capacity included."""
        arrays = [array for layer in self.layers for array in layer.arrays()]
        return sum(array.nbytes for array in arrays + (self.follower.arrays() if self.follower else []))


def _attention_mask(start: int, T: int, mask: mx.array | None) -> mx.array | str | None:
    """Each token attends to the tokens up to itself. Padding attends to itself, so that no row of scores is empty."""
    if mask is None:
        return None if T == 1 else "causal"
    column, row = mx.arange(start + T), start + mx.arange(T)[:, None]
    visible = (mask[:, None] & (column <= row)) | (column == row)
    return visible[:, None]
