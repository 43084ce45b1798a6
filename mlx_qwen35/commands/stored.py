"""The models that this machine has: conversions, Hugging Face's cache, LM Studio's folders, and nano.

Conversions and downloads can be removed here. LM Studio keeps lists of its models, and removes them itself.
"""

import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.converted import Converted, all_converted
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.checkpoint.hub import NANO, resolve
from mlx_qwen35.checkpoint.names import MTP, VISION
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import has_vision, stored_dtype
from mlx_qwen35.machine.process import is_locked

LM_STUDIO = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
OTHERS = ("model_type_unsupported", "config_missing")  # codes of folders that hold something else
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Stored:
    """A model on this machine.

    name: what follows --model. place: of PLACES. nbytes: on the disk. used: when its files were read last, in seconds
    since 1970. recipe: of a conversion, which follows --recipe. remove: takes it off the disk. check_unused:
    InputError where a process uses it. storage: see `storage`.
    holds: of "text", "vision" and "drafts". fault: why it cannot be used, as a code of errors.py, or UNFINISHED; ""
    where it can.
    """

    name: str
    place: str
    folder: Path
    nbytes: int
    used: float | None
    recipe: str = ""
    remove: Callable[[], None] | None = None
    check_unused: Callable[[], None] | None = None
    storage: str = ""
    holds: tuple[str, ...] = ()
    fault: str = ""

    @property
    def of_family(self) -> bool:
        """Whether it is a model of this family, or may be one whose files are not whole."""
        return self.fault not in OTHERS

    @property
    def typed(self) -> str:
        """What follows --model, with --recipe where it is a conversion."""
        return f"{self.name} --recipe {self.recipe}" if self.recipe else self.name


PLACES = {  # place -> its title in a list
    "converted": "Converted here",
    "hub": "Hugging Face's cache",
    "lm studio": "LM Studio",
    "package": "In the package",
}


def stored() -> list[Stored]:
    """All of them, in the order of PLACES."""
    nano = resolve(NANO)
    return [*_conversions(), *_hub(), *_lm_studio(), _seen(Stored(NANO, "package", nano, *_files(nano)))]


def _seen(found: Stored) -> Stored:
    """With what its folder's headers tell, which may be damaged."""
    try:
        checkpoint = open_checkpoint(found.folder)
    except InputError as error:
        return replace(found, fault=error.code)
    parts = {"text": True, "vision": has_vision(checkpoint), "drafts": checkpoint.has(MTP)}
    return replace(found, storage=storage(checkpoint), holds=tuple(part for part, there in parts.items() if there))


def storage(checkpoint: Checkpoint) -> str:
    """ "bfloat16", "4 bit", or "4 bit, mixed": the most frequent one of the text model's matrices."""
    text = (name for name in checkpoint.shapes if not name.startswith((VISION, MTP)))
    found = Counter(
        quantization.mode if quantization.mode != "affine" else f"{quantization.bits} bit"
        for quantization in map(checkpoint.quantization, text)
        if quantization
    )
    if not found:
        return dtype_name(stored_dtype(checkpoint))
    return found.most_common(1)[0][0] + (", mixed" if len(found) > 1 else "")


def _files(folder: Path) -> tuple[int, float | None]:
    """Bytes of the files in a folder, and when one of them was read last."""
    total, used = 0, None
    for file in folder.rglob("*"):
        with suppress(OSError):
            stat = file.stat()
            if file.is_file():
                total, used = total + stat.st_size, max(used or 0, stat.st_atime)
    return total, used


def _conversions() -> Iterator[Stored]:
    for kept in all_converted():
        used, remove = _files(kept.folder)[1], functools.partial(_remove_conversion, kept)
        check = functools.partial(refuse_use, kept.folder)
        found = Stored(kept.name, "converted", kept.folder, kept.nbytes, used, kept.recipe, remove, check)
        yield _seen(found) if kept.finished else replace(found, fault=UNFINISHED)


def _remove_conversion(kept: Converted) -> None:
    refuse_use(kept.folder)
    kept.remove()


def _hub() -> Iterator[Stored]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return
    for repository in sorted(cache.repos, key=lambda repository: repository.repo_id):
        revisions = sorted(repository.revisions, key=lambda found: ("main" not in found.refs, found.commit_hash))
        if repository.repo_type != "model" or not revisions:
            continue
        folder, used = revisions[0].snapshot_path, repository.last_accessed
        remove, check = (functools.partial(act, repository.repo_path) for act in (_remove_download, _check_download))
        found = Stored(repository.repo_id, "hub", folder, repository.size_on_disk, used, "", remove, check)
        yield _seen(found)


def _remove_download(place: Path) -> None:
    """Remove a repository from Hugging Face's cache, in all its revisions."""
    _check_download(place)
    try:
        shutil.rmtree(place)
    except OSError as error:
        raise InputError("output_unwritable", f"{place} could not be removed: {error}") from error


def _lm_studio() -> Iterator[Stored]:
    home = Path("~").expanduser()
    for place in (Path(name).expanduser() for name in LM_STUDIO):
        for folder in sorted(place.glob("*/*/")):
            name = f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
            yield _seen(Stored(name, "lm studio", folder, *_files(folder)))


# --- what is in use --------------------------------------------------------------------------------------------------


def refuse_use(folder: Path) -> None:
    """InputError where a process has loaded the model in this folder."""
    if is_locked(folder / "config.json"):
        raise InputError("target_busy", f"{folder} is in use: a process has loaded it. End that, then remove it")


def _check_download(place: Path) -> None:
    """InputError where a process has loaded a revision in this place of Hugging Face's cache, or downloads into it."""
    for snapshot in place.glob("snapshots/*"):
        refuse_use(snapshot)
    if any(map(is_locked, (place.parent / ".locks" / place.name).glob("*.lock"))):
        raise InputError("target_busy", f"{place} is being downloaded by a process. Wait for it, or end it")
