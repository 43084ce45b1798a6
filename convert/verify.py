"""What the conversion cost and whether the disk holds it: errors of what is written, and files read again."""

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.measure.layerwise import Told, silent

_SAFE = 1e-15, 1e15  # magnitudes whose squares float32 can add up


@dataclass(frozen=True)
class Error:
    """Of a tensor as written: squared error as a share of the sum of squares, and the largest absolute error."""

    relative: float
    largest: float


@dataclass(frozen=True)
class Difference:
    """Sums over some rows: of squared errors and of squares, in float64, and the largest absolute error."""

    squared: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def __add__(self, other: "Difference") -> "Difference":
        largest = max(self.largest, other.largest)
        return Difference(self.squared + other.squared, self.squares + other.squares, largest)

    @property
    def error(self) -> Error:
        return Error(self.squared / self.squares if self.squares else float(self.squared > 0), self.largest)


def difference(values: np.ndarray, written: np.ndarray) -> Difference:
    """Of float32 arrays (rows, columns): the source's values and what is written for them."""
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


# --- reading again ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A range of a file with the checksum that it had in memory, and the tensor that it belongs to."""

    start: int
    nbytes: int
    checksum: int
    name: str


def checksum(data: np.ndarray | bytes) -> int:
    return zlib.crc32(data)


def check_file(file: Path, pieces: Iterable[Piece], told: Told = silent) -> str:
    """Read a file that was written in pieces, from the disk where the system can be told to, and return its sha256.

    told: called with the bytes of each piece. InputError names the first tensor that is not what was written.
    """
    whole, position = hashlib.sha256(), 0
    with file.open("rb", buffering=0) as stream:
        _forget(stream.fileno())
        for piece in sorted(pieces, key=lambda piece: piece.start):
            data = stream.read(piece.nbytes)
            if piece.start != position or len(data) != piece.nbytes or checksum(data) != piece.checksum:
                raise _differs(file, piece.name)
            whole.update(data)
            position += piece.nbytes
            told(piece.nbytes)
        if stream.read(1):
            raise _differs(file, "its end")
    return whole.hexdigest()


def check_copy(file: Path, original: Path) -> str:
    """The sha256 of a file; InputError unless `original` has the same."""
    with file.open("rb") as stream, original.open("rb") as other:
        _forget(stream.fileno())
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != hashlib.file_digest(other, "sha256").hexdigest():
            raise _differs(file, "its text")
    return found


def _forget(descriptor: int) -> None:
    """Have the next reads come from the disk and not from memory, where the system offers it."""
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _differs(file: Path, name: str) -> InputError:
    return InputError(
        "output_differs",
        f"what is written must read back the same; in {file.name} {name} does not. Disk or memory may be failing: "
        "check them, then convert again, perhaps to another disk",
    )


def totals(differences: Mapping[str, Iterable[Difference]]) -> dict[str, Error]:
    """The errors of whole tensors from those of their rows, which are added in the order given."""
    return {name: sum(parts, Difference()).error for name, parts in differences.items()}
