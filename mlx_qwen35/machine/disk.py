"""A folder that one process at a time works in."""

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
