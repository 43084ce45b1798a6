"""Reading the file of a session: what it says of itself, and its arrays. Where it is damaged, it tells so."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.checkpoint.tensors import Header, as_array, open_header
from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

FORMAT, VERSION = "mlx_qwen35.session", "1"
PIECE = 1 << 24  # bytes that are read at a time
UNKNOWN = "0" * 64  # the checksum, as it counts in itself
BEGINNING = b'{"__metadata__": {"checksum": "'
PLACE = 8 + len(BEGINNING)  # of the checksum


class SavedFile:
    """A file that `SessionFile` wrote. Raises InputError: output_unwritable or file_unreadable where it cannot be read
    now, session_invalid where it is not as it was written.
    """

    format = FORMAT  # of the file: what it holds

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                "output_unwritable", f"{self.path} must be a file that can be read and written: {error.strerror}"
            ) from error

    def header(self) -> Header:
        """Tensors and metadata. InputError session_invalid where the file is no session of this version, or shorter
        than it says.
        """
        try:
            header = open_header(self.path)
        except InputError as error:
            if error.code == "file_unreadable":  # it may be as it was written
                raise
            raise InputError(
                "session_invalid", f"{self.path} must be a session as it was saved; it is {self._fault(error.code)}"
            ) from error
        for name, known in (("format", self.format), ("version", VERSION)):
            if (found := header.metadata.get(name)) != known:
                raise InputError("session_invalid", f"{self.path}: {name!r} must be {known}, got {shown(found)}")
        if next(iter(header.metadata)) != "checksum":
            raise InputError("session_invalid", f"{self.path}: 'checksum' must come first; the file was changed")
        return header

    def _fault(self, code: str) -> str:
        """What a file is that has no header, by the error that tells so."""
        with self._telling(), self.path.open("rb") as file:
            beginning = file.read(PLACE)[8:]
        if not BEGINNING.startswith(beginning):
            return "none, or damaged at its beginning"
        return {
            "safetensors_truncated": "truncated", "safetensors_too_long": "longer than it says: bytes were added to it",
        }.get(code, "damaged")  # fmt: skip

    def arrays(self) -> Iterator[tuple[str, mx.array]]:
        """Every tensor, in the order in which they were written, each in memory of its own. What came is to be used
        only once the end is reached.

        Raises InputError session_invalid behind the last one where the checksum differs.
        """
        header, digest = self.header(), hashlib.sha256()
        entries = sorted(header.entries.values(), key=lambda entry: (entry.start, entry.nbytes))
        with self._telling(), self.path.open("rb") as file:
            head = bytearray(file.read(entries[0].start if entries else -1))
            head[PLACE : PLACE + len(UNKNOWN)] = UNKNOWN.encode()
            digest.update(head)
            for entry in entries:
                data = bytearray(entry.nbytes)
                for start in range(0, entry.nbytes, PIECE):
                    piece = memoryview(data)[start : start + PIECE]
                    file.readinto(piece)
                    digest.update(piece)
                yield entry.stored_name, as_array(data, entry.dtype).reshape(entry.shape)
        if digest.hexdigest() != header.metadata["checksum"]:
            raise InputError(
                "session_invalid",
                f"{self.path}: 'checksum' must be that of its bytes; the file was damaged or changed",
            )
