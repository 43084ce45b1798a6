"""Folders and files that a run writes: one process at a time, and errors of the disk as the user can mend them."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_qwen35.errors import InputError


@contextmanager
def held(folder: Path, out: Path, does: str) -> Iterator[None]:
    """The block alone works in a folder, which is made. The lock ends with the process, however that ends.

    out: the folder as the user knows it. does: what is done with it, as "trains into".

    Raises InputError: target_busy where another process has it, output_unwritable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError("output_unwritable", f"{folder} must be writable: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(
            "target_busy", f"one process at a time {does} a folder; another one has {out}. Wait for it"
        ) from error
    finally:
        os.close(lock)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """InputError where the disk fails: disk_full, output_unwritable. path: what is written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError("disk_full", f"the disk has no room for {path}. Make room, and start again") from error
        raise InputError(
            "output_unwritable", f"{path} could not be written: {error}. Check permissions, or choose another folder"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Replace a file of text: it holds all of the text, or what it held before. InputError where the disk fails."""
    hidden = path.with_name(f".{path.name}.writing")
    with telling(path):
        try:
            with hidden.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise
