"""The process: one lock for what runs, refusals where it cannot work (forked after MLX had started, or in a folder that
was removed), and files that other processes are to see in use.
"""

import fcntl
import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.errors import InputError

LOCK = threading.RLock()  # held while a model computes: engines, conversations and scores in several threads take turns

_started = False  # whether MLX had computed something when this process, or one that it comes from, was last forked
_forked = False


def _before_fork() -> None:
    global _started
    _started = bool(mx.get_peak_memory() or mx.get_active_memory())


def _in_child() -> None:
    global _forked
    _forked = _forked or _started


os.register_at_fork(before=_before_fork, after_in_child=_in_child)


def refuse_fork() -> None:
    """InputError in a process that was forked after MLX had started: its threads are not there, and it would hang."""
    if _forked:
        raise InputError(
            "process_forked",
            "a model cannot be loaded or run in a process that was forked after MLX had started to compute: MLX's "
            "threads stayed behind. Start processes with multiprocessing's 'spawn', or fork before the first model",
        )


def check_folder() -> None:
    """InputError where the current folder was removed, or must not be looked at."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            "current_folder_missing", f"the current folder must be there: {error.strerror}. Change to another one"
        ) from error


def show_in_use(file: Path, owner: object) -> None:
    """To other processes the file `is_locked` as long as the owner lives, where the file system has locks."""
    with suppress(OSError):
        opened = os.open(file, os.O_RDONLY)
        weakref.finalize(owner, os.close, opened)
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_locked(file: Path) -> bool:
    """Whether a process has locked this file."""
    with suppress(OSError):
        opened = os.open(file, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(opened)
    return False
