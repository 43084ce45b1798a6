"""Parts of tensors in files, of which only what is wanted is held."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_qwen35.checkpoint.tensors import DTYPE_BYTES, PIECE, Entry, read_bytes


@dataclass(frozen=True, kw_only=True)
class Cut(Entry):
    """Ranges of rows, or of columns, of a tensor in a file. `shape` and `nbytes` are of this part.

    tensor: the whole of it. axis: 0 for rows, 1 for columns. ranges: of that axis, side by side in the part.
    """

    tensor: Entry
    axis: int
    ranges: tuple[range, ...]

    partial = True

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the part. Rows are read alone; columns out of blocks of whole rows, one block at a time: disks
        deliver pages, which hold the columns between.
        """
        whole, width = self.tensor, DTYPE_BYTES[self.dtype] * math.prod(self.tensor.shape[1:])  # bytes of a row
        with whole.file.open("rb") as stream:
            for rows in _blocks(self.ranges if self.axis == 0 else (range(whole.shape[0]),), width):
                block = read_bytes(whole, stream.fileno(), rows.start * width, len(rows) * width)
                yield block if self.axis == 0 else self._columns(block, len(rows))

    def _columns(self, block: bytes, rows: int) -> bytes:
        cells = np.frombuffer(block, np.uint8).reshape(rows, self.tensor.shape[1], -1)
        return b"".join([cells[:, own.start : own.stop].tobytes() for own in self.ranges])


def _blocks(ranges: Sequence[range], width: int) -> Iterator[range]:
    """The ranges of rows of `width` bytes, in steps of a few megabytes."""
    step = max(1, PIECE // max(1, width))
    for own in ranges:
        for start in range(own.start, own.stop, step):
            yield range(start, min(start + step, own.stop))


def cut(entry: Entry, axis: int, ranges: Sequence[range]) -> Entry:
    """These ranges of an axis of a tensor, in their order."""
    held = sum(map(len, ranges))
    if held == entry.shape[axis]:
        return entry
    shape = (*entry.shape[:axis], held, *entry.shape[axis + 1 :])
    nbytes = math.prod(shape) * DTYPE_BYTES[entry.dtype]
    return Cut(
        entry.file, entry.stored_name, entry.dtype, shape, entry.start, nbytes, entry.lazy,
        tensor=entry, axis=axis, ranges=tuple(ranges),
    )  # fmt: skip
