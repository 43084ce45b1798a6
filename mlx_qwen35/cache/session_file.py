"""The file of a session: safetensors that one process at a time uses, whole or not there at all, and that tells damage.

It is written under a hidden name in the same folder, and takes its own in one step. So a process that ends at any
moment leaves the old file or the new one. The first entry of its metadata is the SHA-256 of all bytes of the file, its
own 64 digits counted as zeros.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.session_reading import PLACE, UNKNOWN, VERSION, SavedFile
from mlx_qwen35.checkpoint.dtypes import STORED, dtype_name
from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

PIECE = 1 << 24  # bytes that are written at a time
_STORED = {**STORED, "uint32": "U32", "uint8": "U8"}


class Taken(NamedTuple):
    """The numbers of an array in memory of their own, outside of MLX: any thread may write them."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    data: np.ndarray  # bytes, uint8

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @classmethod
    def of(cls, array: mx.array) -> "Taken":
        """Copy an array, which may be a view of a larger one."""
        words = np.array(mx.view(array, {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]))
        return cls(array.dtype, array.shape, np.ascontiguousarray(words).reshape(-1).view(np.uint8))


class Bytes(NamedTuple):
    """Bytes that are made when they are written, as the pixels of a page are."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]  # uint8
    dtype: mx.Dtype = mx.uint8

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)


Stored = mx.array | Taken | Bytes


class SessionFile(SavedFile):
    """A path that belongs to this process until `close`, whether a file is there or not.

    The lock is on the file, or where there is none on the hidden file that is to become it. It ends with the process.

    mode: permissions of a new file, without those that the process's mask takes.

    Raises InputError: session_busy where another process has it, output_unwritable where no file can be written.
    """

    def __init__(self, path: str | Path, mode: int = 0o666):
        if not isinstance(path, str | Path) or Path(path) == Path():
            raise InputError("session_invalid", f"a session must have the name of a file, got {shown(path)}")
        super().__init__(Path(path).resolve())
        self._hidden = self.path.with_name(f".{self.path.name}.saving")
        self._mode, self._lock = mode, -1
        with self._telling():
            if self.there and not self.path.is_file():
                raise InputError("session_invalid", f"a session must be a file; {self.path} is none")
            self._lock = self._own()
            if not self._holds(self._hidden):
                self._try()

    @property
    def there(self) -> bool:
        return self.path.exists()

    def close(self) -> None:
        """Give it up. Closing twice is fine."""
        if self._lock >= 0:
            if self._holds(self._hidden):
                self._hidden.unlink()
            os.close(self._lock)
            self._lock = -1

    def _holds(self, path: Path) -> bool:
        """Whether the lock is on the file that has this path now."""
        return _same(self._lock, path)

    def _try(self) -> None:
        """Take and remove the hidden file: that it can be written is known before an answer is, and what a killed
        process left of it goes.
        """
        try:
            hidden = self._own(saving=True)
        except BaseException:
            self.close()
            raise
        self._hidden.unlink()
        os.close(hidden)

    def _own(self, saving: bool = False) -> int:
        """Lock the file, or the hidden one where there is none or it is `saving`; the descriptor."""
        while True:
            path = self._hidden if saving or not self.there else self.path
            flags = os.O_RDWR | os.O_CREAT if path == self._hidden else os.O_RDONLY
            lock = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, self._mode)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same(lock, path):
                    return lock
            except BlockingIOError as error:
                os.close(lock)
                raise InputError(
                    "session_busy", f"one process at a time uses a session; another one has {self.path}"
                ) from error
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # it was renamed or removed since it was opened

    # --- writing ---

    def write(self, metadata: Mapping[str, str], arrays: Mapping[str, Stored]) -> int:
        """Replace the file; its bytes. Beside the arrays this takes memory for two pieces of them. Format and version
        are added to the metadata. The file keeps its permissions; a new one has the usual ones.

        Raises InputError: session_closed behind `close`; disk_full; output_unwritable, also where another program made
        a file of this name meanwhile; session_busy where the file was removed and another process has begun it anew.
        Then the old file is as it was.
        """
        if self._lock < 0:
            raise InputError(
                "session_closed", f"{self.path} must be saved before the session is closed. Load it again to go on"
            )
        header = _header({"format": self.format, "version": VERSION, **metadata}, arrays)
        nbytes = len(header) + sum(array.nbytes for array in arrays.values())
        with self._telling():
            if self.there and not self._holds(self.path):
                raise InputError(
                    "output_unwritable",
                    f"{self.path} must be the file that was opened; another one has appeared there since. Move it away "
                    "and save again",
                )
            new = self._lock if self._holds(self._hidden) else self._own(saving=True)
            try:
                os.ftruncate(new, 0)  # what a process left that was killed
                if self.there:
                    os.fchmod(new, stat.S_IMODE(self.path.stat().st_mode))
                self._check_space(nbytes)
                _fill(new, header, arrays)
                os.rename(self._hidden, self.path)
            except BaseException:
                if new == self._lock:
                    os.ftruncate(new, 0)
                else:
                    self._hidden.unlink(missing_ok=True)
                    os.close(new)
                raise
            if new != self._lock:
                os.close(self._lock)
                self._lock = new
            _sync(self.path.parent)
        return nbytes

    def _check_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < nbytes:
            raise InputError(
                "disk_full",
                f"{self.path} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free. Make room",
            )


def _header(metadata: Mapping[str, str], arrays: Mapping[str, Stored]) -> bytes:
    """Length and JSON of a safetensors file, the checksum still zeros."""
    metadata = {"checksum": UNKNOWN, **metadata}
    values: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        stored = _STORED[dtype_name(array.dtype)]
        values[name] = {"dtype": stored, "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(values).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _fill(file: int, header: bytes, arrays: Mapping[str, Stored]) -> None:
    """Write everything to an empty file, and then the checksum."""
    digest = hashlib.sha256(header)
    with os.fdopen(os.dup(file), "wb") as stream:
        stream.seek(0)
        stream.write(header)
        for array in arrays.values():
            for piece in _pieces(array):
                digest.update(piece)
                stream.write(piece)
    os.pwrite(file, digest.hexdigest().encode(), PLACE)
    _flush(file)


def _pieces(array: Stored) -> Iterator[memoryview]:
    """The bytes of an array, which may be a view of a larger one, in the order of its numbers."""
    if isinstance(array, Taken):
        yield array.data.data
        return
    if isinstance(array, Bytes):
        yield np.ascontiguousarray(array.make()).data
        return
    axis = next((i for i, size in enumerate(array.shape) if size > 1), None)
    if array.nbytes <= PIECE or axis is None:
        if array.size:
            yield np.array(mx.view(array.flatten(), mx.uint8)).data
        return
    rows = max(1, PIECE * array.shape[axis] // array.nbytes)
    for part in mx.split(array, range(rows, array.shape[axis], rows), axis):
        yield from _pieces(part)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(file: int) -> None:
    """Wait until a file or folder is on the disk, on macOS also out of the drive's own cache."""
    os.fsync(file)
    if command := getattr(fcntl, "F_FULLFSYNC", None):
        with suppress(OSError):  # a disk on the network has no such command
            fcntl.fcntl(file, command)


def _same(file: int, path: Path) -> bool:
    """Whether a descriptor is of the file that has this path now."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())
