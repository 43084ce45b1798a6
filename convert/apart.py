"""Files that are read must not lie in a folder that is written, replaced or removed, under any name.

Device and inode identify a file or folder: two spellings of a name, links, and a folder mounted in two places are one.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.errors import InputError

Key = tuple[int, int]  # device, inode


@dataclass(frozen=True)
class Reads:
    """What a conversion reads: the folders of source and adapter, and files of texts and recipes."""

    folders: tuple[Path, ...]
    files: tuple[Path, ...] = ()


def check_apart(reads: Reads, target: Path, written: tuple[Path, ...]) -> None:
    """InputError when a path that is read is, holds, lies in, or is linked to one of the folders written.

    written: the target and the hidden folders beside it; they need not exist.
    """
    content = {folder: list(_within(Path(os.path.realpath(folder)))) for folder in reads.folders}
    within = [path for found in content.values() for path, *_ in found]
    read = {path: key_of(path) for path in (*reads.folders, *within, *reads.files)}
    for folder in written:
        for own, found in content.items():
            if {key for _, key, is_folder in found if is_folder} & _above(folder):
                raise _overlap(f"{folder} is or lies in {own}, which is read", target)
        itself, there = key_of(folder), {key for _, key, _ in _within(folder)}
        for path, key in read.items():
            if key and (key in there or itself in _above(path)):
                raise _overlap(f"{folder} holds, or is linked to, {path}, which is read", target)


def key_of(path: Path | int) -> Key | None:
    """The key behind a path or descriptor; None where nothing is there or can be reached."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _above(path: Path) -> set[Key]:
    """The keys of a path and of all folders above it, as far as they exist."""
    path = Path(os.path.realpath(path))
    return {key for part in (path, *path.parents) if (key := key_of(part))}


def _within(path: Path) -> Iterator[tuple[Path, Key, bool]]:
    """A file or folder and everything within it, and whether it is a folder; links count as themselves.

    A folder that cannot be listed is skipped: nothing in it can be removed either.
    """
    left = [path]
    while left:
        path = left.pop()
        try:
            status = os.lstat(path)
            is_folder = stat.S_ISDIR(status.st_mode)
            left += [path / name for name in os.listdir(path)] if is_folder else []
        except (FileNotFoundError, PermissionError):
            continue
        yield path, (status.st_dev, status.st_ino), is_folder


def _overlap(what: str, target: Path) -> InputError:
    rule = "what is read and what --mlx-path replaces must lie apart"
    return InputError("target_overlaps_source", f"{rule}; with --mlx-path {target} {what}. Choose another --mlx-path")
