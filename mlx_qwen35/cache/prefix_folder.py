"""A folder of files like those of sessions, each written whole or not at all, which one process at a time uses."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.cache.session_file import SessionFile, Taken
from mlx_qwen35.cache.session_reading import SavedFile
from mlx_qwen35.errors import InputError

ASIDE = ".damaged"  # behind the name of a file that is
_OWNER = "server"  # the name that the process locks


class Damaged(Exception):
    """A file is not as it was written, or is gone."""

    def __init__(self, name: str, why: Exception):
        super().__init__(str(why))
        self.name = name


class Folder:
    """It belongs to this process until `close`. Names are of files in it.

    Raises InputError: session_busy where another process has it, output_unwritable where it cannot be made or used.
    """

    def __init__(self, path: Path):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError("output_unwritable", f"{path} must be a folder: {error.strerror}") from error
        self.path, self._lock = path, SessionFile(path / _OWNER, mode=0o600)
        for left in (*path.glob(".*.safetensors.saving"), *path.glob(f"*{ASIDE}")):  # by an earlier process
            left.unlink(missing_ok=True)

    def close(self) -> None:
        self._lock.close()

    def save(self, name: str, metadata: Mapping[str, str], arrays: Mapping[str, Taken]) -> int:
        """Write a file; its bytes. InputError where that cannot be done; then it is not there."""
        file = SessionFile(self.path / name, mode=0o600)  # it tells what was asked
        try:
            return file.write(metadata, arrays)
        finally:
            file.close()

    def remove(self, *names: str) -> None:
        """Remove files, those that are there."""
        for name in names:
            with contextlib.suppress(OSError):
                (self.path / name).unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.path / name).rename(self.path / (name + ASIDE))

    def touch(self, name: str) -> None:
        """Note that a file was used now."""
        with contextlib.suppress(OSError):
            os.utime(self.path / name)

    def stat(self, name: str) -> os.stat_result:
        return (self.path / name).stat()

    def arrays(self, name: str) -> list[tuple[str, mx.array]]:
        """The arrays of a file. Damaged where it is not as it was written, InputError where it cannot be read now."""
        with self._reading(name) as file:
            return list(file.arrays())

    def metadata(self, name: str) -> dict[str, str]:
        """What a file says of itself. Raises as `arrays`."""
        with self._reading(name) as file:
            return file.header().metadata

    def headers(self, ending: str, damaged: Callable[[Damaged], None]) -> Iterator[tuple[str, dict[str, str]]]:
        """Names with this ending, and what the files say of themselves. damaged: is told of those that do not."""
        for path in sorted(self.path.glob(f"[!.]*{ending}")):
            try:
                yield path.name, self.metadata(path.name)
            except Damaged as error:
                damaged(error)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[SavedFile]:
        try:
            yield SavedFile(self.path / name)
        except InputError as error:
            if error.code == "session_invalid" or not (self.path / name).exists():
                raise Damaged(name, error) from error
            raise
