"""The folder to be written: what may be written over, and how it appears whole or not at all."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_qwen35.convert.journal import JOURNAL, OtherConversion
from mlx_qwen35.errors import InputError


def _hidden(target: Path, purpose: str) -> Path:
    return target.with_name(f".{target.name}.{purpose}")


def check_target(target: Path, overwrite: bool) -> None:
    """InputError unless `target` is absent, an empty folder, or a checkpoint that --overwrite may replace."""
    if target.exists() and not target.is_dir():
        raise InputError(
            "target_refused", f"--mlx-path must be a folder to write; {target} is a file. Choose another name"
        )
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(
            "target_refused",
            f"--mlx-path must be new or empty; {target} is not. Choose another name or add --overwrite",
        )
    if not (target / "config.json").is_file() or not any(target.glob("*.safetensors")):
        raise InputError(
            "target_refused",
            f"--overwrite replaces checkpoints only; {target} holds no config.json with *.safetensors. Choose another "
            "name or empty it yourself",
        )


def check_apart(source: Path, target: Path) -> None:
    """InputError when one of the two folders lies in the other."""
    source = source.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise InputError(
            "target_overlaps_source",
            f"the source and --mlx-path must lie apart; the source is {source} and --mlx-path is {target}. Choose a "
            "folder outside the source",
        )


def check_space(nbytes: int, target: Path) -> None:
    """InputError unless the disk on which `target` is, or is to be, has room for `nbytes`.

    What a conversion that is resumed has written already is room too.
    """
    free = shutil.disk_usage(next(folder for folder in target.parents if folder.is_dir())).free
    there = sum(512 * path.stat().st_blocks for path in _hidden(target, "converting").glob("*.safetensors"))
    if free + there < nbytes:
        raise InputError(
            "disk_full",
            f"{target} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free. Make room, or choose "
            "another disk or fewer bits",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(work: Path, target: Path) -> int:
    """Make the working folder ours: a descriptor whose lock ends with the process, however that ends."""
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(lock), os.stat(work))
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        os.close(lock)
        raise InputError(
            "target_busy", f"one conversion at a time writes {target}; another one is running. Wait for it"
        )
    return lock


def _clean(work: Path, resume: bool) -> None:
    """Remove what a killed conversion left."""
    if resume:
        print(f"nothing to resume in {work}: converting from the start", file=sys.stderr)
    left = list(work.iterdir())
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left:
        print(f"removed the unfinished conversion in {work} (--resume would have gone on with it)", file=sys.stderr)


def _restore(replaced: Path, target: Path) -> None:
    """A checkpoint that was about to be replaced goes back to its place."""
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)


def _put_in_place(work: Path, replaced: Path, target: Path) -> None:
    (work / JOURNAL).unlink(missing_ok=True)  # the conversion is whole
    for path in (*work.iterdir(), work):
        _sync(path)
    try:
        if target.exists():
            os.rename(target, replaced)
        os.rename(work, target)
    except BaseException:
        _restore(replaced, target)
        raise
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def appearing_whole(target: Path, overwrite: bool, resume: bool = False) -> Iterator[Path]:
    """A hidden folder beside `target` to write into, which takes its name when the block ends well and goes otherwise.

    A killed process leaves the hidden folder; the next conversion to the same target removes it, or with `resume` finds
    in it what there was. It stays as it is when that turns out to be of another conversion.
    """
    work, replaced = _hidden(target, "converting"), _hidden(target, "replaced")
    try:
        lock = _claim(work, target)
        try:
            if not (resume and (work / JOURNAL).is_file()):
                _clean(work, resume)
            _restore(replaced, target)  # a killed conversion was about to replace it
            shutil.rmtree(replaced, ignore_errors=True)
            check_target(target, overwrite)
            yield work
            _put_in_place(work, replaced, target)
        except OtherConversion:
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            os.close(lock)
    except OSError as error:
        raise InputError(
            "output_unwritable",
            f"{target} could not be written: {error}. Check permissions and disk, or choose another --mlx-path",
        ) from error
