"""The folder to be written: which folders may be replaced, and how it appears whole or not at all.

The conversion writes into a hidden folder beside the target, which its journal marks as ours, and which takes the
target's name in one step. Hidden folders of the same names without a journal of ours are never touched.
"""

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_qwen35.checkpoint.converted import hidden, home
from mlx_qwen35.checkpoint.folder import sync
from mlx_qwen35.console.notices import tell
from mlx_qwen35.convert.apart import Reads, check_apart, key_of
from mlx_qwen35.convert.exchange import exchange
from mlx_qwen35.convert.journal import JOURNAL, OtherConversion, note_placing, replaces
from mlx_qwen35.errors import InputError


def written(target: Path) -> tuple[Path, Path, Path]:
    """The target, the hidden folder that is written into, and the hidden name of the folder that is replaced."""
    return target, hidden(target)[0], target.with_name(f".{target.name}.replaced")


# --- what may be written ---------------------------------------------------------------------------------------------


def target_path(named: str | Path) -> Path:
    """The folder that --mlx-path names, with links resolved. InputError where no folder can have that name."""
    if not str(named).strip():
        raise InputError("option_missing", "--mlx-path must be given: the folder to write")
    try:
        target = Path(named).expanduser().resolve()
        str(target).encode()  # it is printed, and stands in the card
        for path in written(target):
            with suppress(FileNotFoundError):
                path.lstat()
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            "output_unwritable", f"--mlx-path must name a folder that can be made, got {str(named)[:200]}: {reason}"
        ) from error
    return target


def check_target(target: Path, overwrite: bool) -> None:
    """InputError unless `target` is absent, an empty folder, or a checkpoint that --overwrite may replace."""
    if target.exists() and not target.is_dir():
        raise InputError("target_refused", f"--mlx-path must be a folder; {target} is a file. Choose another name")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        advice = "Choose another name or add --overwrite"
        raise InputError("target_refused", f"--mlx-path must be new or empty; {target} is not. {advice}")
    if not _is_checkpoint(target):
        why = "holds no config.json with *.safetensors. Choose another name or empty it yourself"
        raise InputError("target_refused", f"--overwrite replaces checkpoints only; {target} {why}")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


# --- the hidden folder -----------------------------------------------------------------------------------------------


def _lock(folder: Path, target: Path) -> int:
    """Lock a folder; return its descriptor. The lock ends with the process, however that ends."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = key_of(lock) == key_of(folder)
    except BlockingIOError:
        ours = False
    if not ours:
        os.close(lock)
        raise _busy(target)
    return lock


def _busy(target: Path) -> InputError:
    return InputError("target_busy", f"one conversion at a time writes {target}; another one is running. Wait for it")


def _is_ours(folder: Path) -> bool:
    journal = folder / JOURNAL
    return journal.is_file() and not journal.is_symlink()


def _claim(target: Path) -> int:
    """Make and lock the hidden folder. InputError where another conversion holds it, or it is not ours."""
    _, work, _ = written(target)
    work.mkdir(parents=True, exist_ok=True)
    lock = _lock(work, target)
    try:
        if any(work.iterdir()) and not _is_ours(work):
            raise _foreign(work, target)
        if _is_ours(target):  # another conversion has placed its folder since we looked
            raise _busy(target)
        (work / JOURNAL).touch()
    except BaseException:
        os.close(lock)
        raise
    return lock


def _foreign(folder: Path, target: Path) -> InputError:
    return InputError(
        "target_refused",
        f"the conversion needs the name {folder}, which holds something that no conversion of this version made. Move "
        f"or remove it, or {_elsewhere(target)}",
    )


def _clean(work: Path, resume: bool) -> None:
    """Remove the leftovers of a killed conversion; `resume` keeps its journal and its weights."""
    journal = work / JOURNAL
    resumes = resume and b"\n" in journal.read_bytes()  # a first line without its end identifies nothing
    if resume and not resumes:
        tell(f"nothing to resume in {work}: converting from the start")
    left = [path for path in work.iterdir() if path != journal and not (resumes and _is_plain(path))]
    if not resumes:
        os.truncate(journal, 0)
    for path in left:
        remove(path)
    if left and not resumes:
        tell(f"removed the unfinished conversion in {work} (--resume would have gone on with it)")


def _is_plain(path: Path) -> bool:
    """Whether this is a file of weights without other names, so that writing into it changes nothing elsewhere."""
    return path.suffix == ".safetensors" and path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1


def remove(path: Path) -> None:
    """Remove a file, link or folder. The journal goes last: without it a folder is not known as ours."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    for inner in path.iterdir():
        if inner.name != JOURNAL:
            shutil.rmtree(inner) if inner.is_dir() and not inner.is_symlink() else inner.unlink()
    (path / JOURNAL).unlink(missing_ok=True)
    path.rmdir()


# --- taking the name -------------------------------------------------------------------------------------------------


def _put_in_place(target: Path) -> None:
    """Give the hidden folder the target's name. The journal names the replaced folder until that is removed."""
    _, work, replaced = written(target)
    full = target.exists() and any(target.iterdir())
    note_placing(work, [target.stat().st_ino] if full else [])
    for path in (*work.iterdir(), work):
        sync(path)
    if not full:
        os.rename(work, target)
    elif not exchange(work, target):
        os.rename(target, replaced)
        try:
            os.rename(work, target)
        except BaseException:
            os.rename(replaced, target)
            raise
    sync(target.parent)
    _finish(target)


def _finish(target: Path) -> None:
    """Remove the replaced folder, then the journal: the conversion is complete."""
    for old in written(target)[1:]:
        if _is_replaced(old, target):
            try:
                shutil.rmtree(old)
            except OSError as error:
                warnings.warn(f"{target} is complete, but the replaced folder is left in {old}: {error}", stacklevel=2)
    (target / JOURNAL).unlink()


def _is_replaced(old: Path, new: Path) -> bool:
    """Whether the journal in `new` names `old` as the replaced folder: by inode, for devices are numbered anew."""
    found, own = key_of(old), key_of(new)
    return bool(found and own and found[0] == own[0] and replaces(new) == [found[1]])


def _recover(target: Path) -> None:
    """Finish a conversion that was killed after it took the target's name."""
    if replaces(target) is None:
        return
    lock = _lock(target, target)
    try:
        _finish(target)
    finally:
        os.close(lock)


def _restore(target: Path) -> None:
    """Give a folder that a killed conversion moved aside its name back."""
    _, work, replaced = written(target)
    if not os.path.lexists(replaced):
        return
    ours = _is_replaced(replaced, work)
    if os.path.lexists(target) or not (ours or _is_checkpoint(replaced)) or replaced.is_symlink():
        raise _foreign(replaced, target)
    os.rename(replaced, target)
    if not ours:  # no journal says who moved it: it stays
        check_target(target, overwrite=False)


@contextmanager
def telling(target: Path) -> Iterator[None]:
    """InputError where the disk fails."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError("disk_full", f"the disk is full, and {target} is not complete. Make room") from error
        raise InputError(
            "output_unwritable",
            f"{target} could not be written: {error}. Check permissions and disk, or {_elsewhere(target)}",
        ) from error


def _elsewhere(target: Path) -> str:
    """What to do for another place."""
    kept = target.is_relative_to(home())
    return "set MLX_QWEN35_HOME to a folder that can be written" if kept else "choose another --mlx-path"


def prepare(target: Path, overwrite: bool, reads: Reads | None) -> None:
    """Finish an earlier conversion. InputError unless the target may be written and lies apart from what is read."""
    with telling(target):
        if reads:
            check_apart(reads, target, written(target))
        _recover(target)
        check_target(target, overwrite)


@contextmanager
def appearing_whole(
    target: Path, overwrite: bool, resume: bool = False, reads: Reads | None = None, keeps: bool = False
) -> Iterator[Path]:
    """A hidden folder beside `target` to write into, which takes its name when the block ends and goes on errors.

    keeps: it stays on errors, to be resumed, unless it does not hold what was written. A killed process leaves it; the
    next conversion to the same target removes it, or resumes it with `resume`. The leftovers of another conversion
    stay. InputError where `reads` does not lie apart from the folders that are written, renamed or removed.
    """
    _, work, _ = written(target)
    begun = not resume  # until then the leftovers stay
    with telling(target):
        prepare(target, overwrite, reads)
        lock = _claim(target)
        try:
            _restore(target)
            check_target(target, overwrite)
            _clean(work, resume)
            begun = True
            yield work
            check_target(target, overwrite)
            if reads:
                check_apart(reads, target, written(target))
            _put_in_place(target)
        except OtherConversion:
            raise
        except BaseException as error:
            stays = keeps and getattr(error, "code", "") != "output_differs"
            if begun and not stays and key_of(lock) == key_of(work):
                with suppress(OSError):
                    remove(work)
            raise
        finally:
            os.close(lock)
