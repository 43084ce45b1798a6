"""Conversions that are kept: folders in a place of their own, found again by the id of the repository and the recipe.

HOME/models/ORG--NAME/RECIPE is a checkpoint; at another revision than the default one, RECIPE@REVISION. Beside it lie,
hidden, what an unfinished conversion has written and what it has downloaded.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from tempfile import mkdtemp
from urllib import parse

from mlx_qwen35.errors import InputError

QUALITY = "quality.json"  # what a conversion tells of itself, the commit of its source too


@dataclass(frozen=True)
class Converted:
    """A conversion that is kept, or an unfinished one. commit: of its source; "" where it is not known."""

    name: str
    recipe: str
    revision: str | None
    folder: Path
    commit: str
    finished: bool

    @property
    def nbytes(self) -> int:
        """What it takes on the disk."""
        return sum(_disk_bytes(place) for place in (self.folder, *hidden(self.folder)))

    def remove(self) -> None:
        """Remove it. InputError where a process is making it, or it cannot be removed.

        It loses its name first: what is left where the removal is broken off is no conversion.
        """
        try:
            with owned(self.folder) as owned_place:
                if self.folder.is_dir():
                    self.folder.rename(mkdtemp(dir=owned_place))
                for place in hidden(self.folder):
                    if place.is_dir():
                        shutil.rmtree(place)
        except OSError as error:
            raise InputError("output_unwritable", f"{self.folder} could not be removed: {error}") from error
        with suppress(OSError):  # others of the same repository may be there
            self.folder.parent.rmdir()


def home() -> Path:
    """MLX_QWEN35_HOME, or mlx_qwen35 in the user's cache."""
    if own := os.environ.get("MLX_QWEN35_HOME"):
        try:
            return Path(own).expanduser()
        except RuntimeError as error:
            raise InputError("output_unwritable", f"MLX_QWEN35_HOME must name a folder, got {own}: {error}") from error
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx_qwen35"


def folder_of(name: str, recipe: str, revision: str | None = None) -> Path:
    """Where the conversion of a repository is kept, whether or not it is there. No id has a double hyphen."""
    at = f"@{parse.quote(revision, safe='')}" if revision else ""
    return home() / "models" / name.replace("/", "--") / f"{recipe}{at}"


def to_4bit(name: str) -> str:
    """What is typed to convert a model of this name to 4 bit."""
    if Path(name).expanduser().exists():
        folder = f"{name.rstrip('/').split('/')[-1]}-4bit"
        return f"mlx_qwen35.convert --hf-path {quote(name)} --mlx-path {quote(folder)} --recipe 4bit"
    return (
        f"mlx_qwen35.generate --model {name} --recipe 4bit\nor in Python\n"
        f"  load(mlx_qwen35.convert.convert_cached({name!r}, recipe='4bit'))"
    )


def hidden(folder: Path) -> tuple[Path, Path]:
    """Beside a folder: what an unfinished conversion has written, and what it has downloaded."""
    return folder.with_name(f".{folder.name}.converting"), folder.with_name(f".{folder.name}.source")


def converted(name: str) -> list[Converted]:
    """The finished conversions of a repository."""
    with suppress(OSError):
        return [found for found in _of(folder_of(name, "any").parent) if found.finished]
    return []


def all_converted() -> list[Converted]:
    """Everything that is kept, unfinished conversions too."""
    with suppress(OSError):
        return [found for place in sorted((home() / "models").iterdir()) for found in _of(place)]
    return []


def _of(place: Path) -> Iterator[Converted]:
    keys = {_key(path) for path in place.iterdir() if path.is_dir()} if place.is_dir() else set()
    for key in sorted(keys - {""}):
        recipe, _, revision = key.partition("@")
        folder = place / key
        finished = (folder / "config.json").is_file()
        commit = _commit(folder) if finished else ""
        name = place.name.replace("--", "/", 1)
        yield Converted(name, recipe, parse.unquote(revision) or None, folder, commit, finished)


def _key(path: Path) -> str:
    """The name of the conversion that a folder belongs to; "" where it belongs to none."""
    if not path.name.startswith("."):
        return path.name
    key = path.name[1:].rpartition(".")[0]
    return key if path in hidden(path.with_name(key or "?")) else ""


def _commit(folder: Path) -> str:
    try:
        return str(json.loads((folder / QUALITY).read_text(encoding="utf-8"))["commit"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _disk_bytes(folder: Path) -> int:
    """Of everything in a folder; of a file with holes what it takes."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += 512 * file.lstat().st_blocks
    return total


@contextmanager
def owned(folder: Path) -> Iterator[Path]:
    """The block alone makes or removes this conversion; it gets the hidden folder for what is downloaded.

    The lock ends with the process, however that ends. InputError names the process that has it.
    """
    place = hidden(folder)[1]
    place.mkdir(parents=True, exist_ok=True)
    lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = place.is_dir() and os.path.samestat(os.fstat(lock), place.stat())
        except BlockingIOError:
            ours = False
        holder = place / "pid"
        if not ours:
            who = f"process {holder.read_text()}" if holder.is_file() else "another process"
            raise InputError(
                "target_busy", f"one process at a time makes or removes {folder}; {who} does. Wait for it, or end it"
            )
        holder.write_text(str(os.getpid()))
        try:
            yield place
        finally:
            if place.is_dir() and os.listdir(place) == [holder.name]:  # nothing is left to go on with
                shutil.rmtree(place)
    finally:
        os.close(lock)
