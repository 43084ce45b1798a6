"""The cache of one decoder layer, for B rows: keys and values, or the states of DeltaNet.

Both kinds have one interface, so `Cache` never asks which it holds:

    reserve(counts)      room for counts[i] more tokens of row i, before they are appended
    append(...)          what a pass adds: keys and values, or new states
    view(row)            the arrays of a row by name, tokens in use only
    rollback(fed, kept)  a cache with the first kept[i] of the fed[i] tokens of row i in the last pass
    select(rows)         a cache of these rows alone
    joined(caches)       a cache of the rows of several
    copy()               a cache with the same content; the two go on apart
    compact()            free the memory that is not in use
    state(), from_state  the content as arrays, and back, with room for so many tokens more
    arrays(), nbytes     every array in memory, and their bytes
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.cache.kv_format import Columns, KVFormat
from mlx_qwen35.kernels.gated_delta import DeltaState
from mlx_qwen35.kernels.low_rank import ActiveAdapters


class ForwardContext(NamedTuple):
    """The T columns of one forward pass, for the layers."""

    counts: tuple[int, ...]  # tokens of each row; the rest of T is padding
    lengths: mx.array | None  # (B,) the same; None: no padding
    positions: mx.array  # (B, T), or (3, B, T) for the T, H and W axes
    stepwise: bool = False  # whether DeltaNet layers store their state after each token
    adapters: ActiveAdapters | None = None  # of the rows; None: no row has one


class CachePosition(NamedTuple):
    """What the rows of a cache hold."""

    lengths: tuple[int, ...]  # tokens of each row
    next_positions: tuple[int, ...]  # the next token's in each row; an image takes fewer positions than tokens

    def after(self, counts: Sequence[int]) -> "CachePosition":
        """The position after counts[i] more tokens of text in row i."""
        pairs = [tuple(map(sum, zip(own, counts, strict=True))) for own in self]
        return CachePosition(*pairs)


# --- attention -------------------------------------------------------------------------------------------------------


class Buffers:
    """The arrays of a row's keys and values, (1, Hk, capacity, ...) each. Several rows may share them, see KVRow."""

    def __init__(self, arrays: dict[str, mx.array]):
        self.arrays = arrays
        self.rows: weakref.WeakSet[KVRow] = weakref.WeakSet()


class KVRow:
    """One row of a KVCache: the first `length` columns of its buffers.

    Copies of a row share its buffers. A row writes behind its own columns, once it has claimed them. Where another row
    uses or has claimed one of them, it moves to buffers of its own first.
    """

    STEP = 256  # columns by which the capacity grows

    def __init__(self, arrays: Mapping[str, mx.array]):
        """arrays: as of `KVFormat.encode`, whose shapes and dtypes it takes; it holds no column yet."""
        self.length = self.claimed = 0
        self._use(Buffers({name: mx.zeros((*a.shape[:2], 0, a.shape[3]), a.dtype) for name, a in arrays.items()}))

    def _use(self, buffers: Buffers) -> None:
        self.buffers = buffers
        buffers.rows.add(self)

    @property
    def capacity(self) -> int:
        return next(iter(self.buffers.arrays.values())).shape[2]

    def copy(self) -> "KVRow":
        row = KVRow.__new__(KVRow)
        row.length = row.claimed = self.length
        row._use(self.buffers)
        return row

    def reserve(self, T: int) -> None:
        """Claim T more columns. Room is made one array after the other, so that memory holds one of them twice."""
        shared, end = self.buffers, self.length + T
        others = max((row.claimed for row in shared.rows if row is not self), default=0)
        self.claimed = end
        if T and others > self.length:
            shared.rows.discard(self)
            self._use(Buffers(dict(shared.arrays)))
            self._resize(end)
        elif end > self.capacity:
            self._resize(end)

    def _resize(self, columns: int) -> None:
        """Buffers of `columns`, rounded up, with the present content. Rows that share them have the new ones too."""
        capacity = -(-columns // self.STEP) * self.STEP
        arrays, kept = self.buffers.arrays, max(row.length for row in self.buffers.rows)
        for name in arrays:
            old = arrays[name]
            _, heads, _, width = old.shape
            room = mx.zeros((1, heads, capacity - kept, width), old.dtype)
            resized = mx.concatenate([old[:, :, :kept], room], axis=2) if kept else room
            arrays[name] = resized
            del old
            mx.eval(resized)

    def append(self, columns: Mapping[str, mx.array], T: int) -> Columns:
        """Write (1, Hk, T, ...) behind the columns in use, where `reserve` made room, and return all in use."""
        start, self.length = self.length, self.length + T
        for name, array in self.buffers.arrays.items():
            array[:, :, start : self.length] = columns[name]
        return Columns(self.buffers.arrays, self.length)

    def view(self) -> dict[str, mx.array]:
        return {name: array[:, :, : self.length] for name, array in self.buffers.arrays.items()}

    def compact(self) -> None:
        """Free columns beyond those that this row and the rows that share its buffers use."""
        self.claimed = self.length
        used = max(row.claimed for row in self.buffers.rows)
        if self.capacity >= used + self.STEP:
            self._resize(used)


class KVCache:
    """Keys (normed and rotated) and values of one attention layer, row by row, in one format."""

    STEP = KVRow.STEP

    def __init__(self, rows: Sequence[KVRow], format: KVFormat):
        self.rows, self.format = list(rows), format

    @classmethod
    def empty(cls, batch: int, heads: int, dim: int, dtype: mx.Dtype, format: KVFormat) -> "KVCache":
        column = mx.zeros((1, heads, 1, dim), dtype)
        columns = format.encode(column, column)
        return cls([KVRow(columns) for _ in range(batch)], format)

    def reserve(self, counts: Sequence[int]) -> None:
        for row, count in zip(self.rows, counts, strict=True):
            row.reserve(count)

    def append(self, keys: mx.array, values: mx.array, counts: Sequence[int]) -> list[Columns]:
        """Append the first counts[i] columns of row i of (B, Hk, T, D); all columns of each row."""
        columns = self.format.encode(keys, values)
        if len(self.rows) == 1 and counts[0] == keys.shape[2]:
            return [self.rows[0].append(columns, counts[0])]
        seen = []
        for i, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            own = {name: array[i : i + 1, :, :count] for name, array in columns.items()}
            seen.append(row.append(own, count))
        return seen

    def view(self, row: int) -> dict[str, mx.array]:
        return self.rows[row].view()

    def rollback(self, fed: Sequence[int], kept: Sequence[int]) -> "KVCache":
        rolled = self.copy()
        for row, n, m in zip(rolled.rows, fed, kept, strict=True):
            row.length = row.claimed = row.length - (n - m)
        return rolled

    def select(self, rows: Sequence[int]) -> "KVCache":
        return KVCache([self.rows[row].copy() for row in rows], self.format)

    @staticmethod
    def joined(caches: Sequence["KVCache"]) -> "KVCache":
        return KVCache([row.copy() for cache in caches for row in cache.rows], caches[0].format)

    def copy(self) -> "KVCache":
        return self.select(range(len(self.rows)))

    def compact(self) -> None:
        for row in self.rows:
            row.compact()

    def state(self) -> list[dict[str, mx.array]]:
        return [self.view(row) for row in range(len(self.rows))]

    @classmethod
    def from_state(cls, state: Sequence[Mapping[str, mx.array]], room: int = 0) -> "KVCache":
        rows = []
        for own in state:
            row, count = KVRow(own), next(iter(own.values())).shape[2]
            row.reserve(count + room)
            row.append(own, count)
            row.claimed = row.length
            rows.append(row)
        return cls(rows, KVFormat.of_arrays(state[0]))

    def arrays(self) -> list[mx.array]:
        return [array for row in self.rows for array in row.buffers.arrays.values()]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())


# --- DeltaNet --------------------------------------------------------------------------------------------------------


class DeltaCache:
    """The conv_state and recurrent_state of one DeltaNet layer, all rows in one array. None is written in place."""

    def __init__(self, values: DeltaState):
        self.values = values
        self.steps: DeltaState | None = None  # the states after each token of the last pass, if it was stepwise

    def reserve(self, counts: Sequence[int]) -> None:
        """A state has one size."""

    def append(self, values: DeltaState, stepwise: bool) -> None:
        """Replace the states by those after a pass: (B, ...), or after each of T tokens where it was stepwise, (B, T,
        ...).
        """
        self.steps = values if stepwise else None
        self.values = DeltaState(*(array[:, -1] for array in values)) if stepwise else values

    def view(self, row: int) -> dict[str, mx.array]:
        return {name: array[row : row + 1] for name, array in self.values._asdict().items()}

    def rollback(self, fed: Sequence[int], kept: Sequence[int]) -> "DeltaCache":
        assert self.steps is not None, "the last pass was not stepwise"
        last = [max(0, count - 1) for count in kept]  # a row that was fed nothing has its old state in every step
        if len(set(last)) == 1:
            return DeltaCache(DeltaState(*(array[:, last[0]] for array in self.steps)))
        return DeltaCache(DeltaState(*(array[mx.arange(len(last)), mx.array(last)] for array in self.steps)))

    def select(self, rows: Sequence[int]) -> "DeltaCache":
        index = mx.array(list(rows))
        selected = DeltaCache(DeltaState(*(array[index] for array in self.values)))
        if self.steps is not None:
            selected.steps = DeltaState(*(array[index] for array in self.steps))
        return selected

    @staticmethod
    def joined(caches: Sequence["DeltaCache"]) -> "DeltaCache":
        arrays = zip(*(cache.values for cache in caches), strict=True)
        return DeltaCache(DeltaState(*(mx.concatenate(list(own)) for own in arrays)))

    def copy(self) -> "DeltaCache":
        return DeltaCache(self.values)

    def compact(self) -> None:
        """Move the states out of the arrays of all steps, which are freed."""
        self.steps = None
        self.values = DeltaState(*(mx.concatenate([array, array[:, :0]], axis=1) for array in self.values))

    def state(self) -> list[dict[str, mx.array]]:
        return [self.view(row) for row in range(len(self.values.conv_state))]

    @classmethod
    def from_state(cls, state: Sequence[Mapping[str, mx.array]], room: int = 0) -> "DeltaCache":
        names = DeltaState._fields
        return cls.joined([cls(DeltaState(*(own[name] for name in names))) for own in state])

    def arrays(self) -> list[mx.array]:
        return [*self.values, *(self.steps or ())]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())


LayerCache = KVCache | DeltaCache
