"""The errors of what is written, and whether the disk holds it."""

import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_qwen35.errors import InputError

_SAFE = 1e-15, 1e15  # magnitudes whose squares float32 can add up


@dataclass(frozen=True)
class Difference:
    """The errors of some rows: sums of squared errors and of squares, in float64, and the largest absolute error."""

    squared: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def __add__(self, other: "Difference") -> "Difference":
        largest = max(self.largest, other.largest)
        return Difference(self.squared + other.squared, self.squares + other.squares, largest)

    @property
    def relative(self) -> float:
        """The squared error as a share of the sum of squares."""
        return self.squared / self.squares if self.squares else float(self.squared > 0)


def difference(values: np.ndarray, written: np.ndarray) -> Difference:
    """The errors of float32 arrays (rows, columns): `written` stands for the source's `values`."""
    error = values - written
    largest = _largest(error)
    return Difference(_squares(error, largest), _squares(values, _largest(values)), largest)


def _largest(values: np.ndarray) -> float:
    return float(max(values.max(), -values.min()))


def _squares(values: np.ndarray, largest: float) -> float:
    """The sum of squares: rows in float32 where that is safe, their sums in float64."""
    if largest == 0:
        return 0.0
    if not _SAFE[0] < largest < _SAFE[1]:
        values = values.astype(np.float64)
    return float(np.einsum("ij,ij->i", values, values).sum(dtype=np.float64))


@dataclass(frozen=True)
class FileRange:
    """A range of a file, the CRC-32 of what was written there, and the name of its tensor for an error."""

    start: int
    nbytes: int
    checksum: int
    name: str


def check_file(
    file: Path, ranges: Iterable[FileRange], progress: Callable[[int], object] = lambda nbytes: None
) -> None:
    """Read a written file again, from the disk where the system can be told to.

    progress: called with the bytes of each range. InputError names the first tensor that does not read back the same,
    or "its end" for a file of another length.
    """
    position = 0
    with file.open("rb", buffering=0) as stream:
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the next reads come from the disk
        for written in sorted(ranges, key=lambda written: written.start):
            data = stream.read(written.nbytes)
            if (written.start, written.nbytes) != (position, len(data)) or zlib.crc32(data) != written.checksum:
                raise _differs(file, written.name)
            position += len(data)
            progress(len(data))
        if stream.read(1):
            raise _differs(file, "its end")


def _differs(file: Path, name: str) -> InputError:
    return InputError(
        "output_differs",
        f"what is written must read back the same; in {file.name} {name} does not. Disk or memory may be failing: "
        "check them, then convert again, perhaps to another disk",
    )
