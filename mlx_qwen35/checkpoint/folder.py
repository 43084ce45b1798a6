"""The files of a checkpoint folder: those of the weights, the error where there are none, and where one is not written.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import read_json
from mlx_qwen35.options import spelled

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files that are read by their names, here or by the tokenizer's library.
_READ = (
    SINGLE, INDEX, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack")


def check_folder(folder: Path) -> None:
    """InputError when there is no such folder, or it holds an adapter, GGUF files, or no file under a file's name.

    Links are followed: in the hub's cache every file is a link out of the folder.
    """
    if not folder.is_dir():
        raise InputError(
            "model_not_found",
            f"a checkpoint must be a folder, a Hugging Face id or 'nano'; there is no folder {folder}",
        )
    names = names_in(folder)
    for name in _READ:
        if name in names:
            check_file(folder / name)
    if "config.json" not in names and (_adapter(names) or _ending(names, ".gguf")):
        raise _without_weights(folder, names)


def safetensors_files(folder: Path) -> list[Path]:
    """The files of the weights: model.safetensors where it is there, else the files that the index names.

    InputError when there is neither, or when a file is absent or outside of the folder.
    """
    check_folder(folder)
    if is_file(folder / SINGLE):
        return [folder / SINGLE]
    if not is_file(folder / INDEX):
        raise _without_weights(folder, names_in(folder))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("index_invalid", f"{folder / INDEX} must hold a 'weight_map' of tensor names to files")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError("index_invalid", f"{folder / INDEX}: 'weight_map' must name files")
    files = sorted({inside(folder, name, str(folder / INDEX)) for name in set(weight_map.values())})
    for file in files:
        if os.path.lexists(file):
            check_file(file)
    if absent := [file.name for file in files if not is_file(file)]:
        raise InputError(
            "weights_missing",
            f"{folder / INDEX} names files that are absent: {shorten(absent)}; download them again",
        )
    return files


def inside(folder: Path, name: str, where: str) -> Path:
    """The file of this name in the folder; InputError, which calls the name's source `where`, for a name outside.

    Only the name counts: the file itself may be a link, as in the hub's cache.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError("path_outside_folder", f"what {where} names must lie inside the folder, got {name!r}")
    return folder / path


def is_file(path: Path) -> bool:
    """Whether a file is there, itself or through links; False for a name that the system does not take."""
    try:
        return path.is_file()
    except OSError:
        return False


def check_file(path: Path) -> None:
    """InputError for anything but a file: a folder, a link to nothing, a pipe."""
    if is_file(path):
        return
    kind = "something else"
    if path.is_dir():
        kind = "a folder"
    elif path.is_symlink():
        kind = f"a link to {os.readlink(path)}, where there is none"
    raise InputError("file_unreadable", f"{path} must be a file and is {kind}; take it away or download it again")


def shorten(names: list[str], most: int = 8) -> str:
    """The first names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- where no weights are --------------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError("file_unreadable", f"{folder} cannot be read ({error.strerror}); mend that first") from error


def _ending(names: Iterable[str], *ends: str) -> list[str]:
    return [name for name in names if name.lower().endswith(ends)]


def _adapter(names: Iterable[str]) -> list[str]:
    return [name for name in names if name in _ADAPTER]


def trained_on(folder: Path) -> str:
    """What an adapter's configuration says of the model that it was trained on, in brackets; "" for nothing."""
    try:
        config = read_json(folder / "adapter_config.json")
    except (InputError, OSError):
        return ""
    named = next((config[key] for key in ("base_model_name_or_path", "model") if config.get(key)), None)
    return f" ({named[:200]})" if isinstance(named, str) and named.isprintable() else ""


def _without_weights(folder: Path, names: list[str]) -> InputError:
    """The error for a folder with neither model.safetensors nor index: what it holds instead, and what to do."""
    if adapter := _adapter(names):
        return InputError(
            "adapter_unmerged",
            f"{folder} holds an adapter ({adapter[0]}) and not a model",
            f"Give the model that it was trained on{trained_on(folder)}, and this folder as {spelled('adapter')}. To "
            f"make one model of both: mlx_qwen35.convert --hf-path MODEL --adapter {folder} --mlx-path OUT",
        )
    rule = f"weights are read from {SINGLE} or from the files that {INDEX} names, and {folder} has neither"
    if other := _ending(names, ".safetensors"):
        more = f"It holds {shorten(other, 3)}: download the index too, or rename a file that is the whole to {SINGLE}"
    elif other := _ending(names, ".gguf"):
        more = f"It holds {shorten(other, 3)}, and GGUF is not read: give the original that it was made from"
    elif other := _ending(names, *_PICKLED):
        more = f"It holds {shorten(other, 3)}: load that with the program that wrote it and save it as safetensors"
    else:
        more = "Download it again, whole"
    return InputError("weights_missing", f"{rule}. {more}")


@contextmanager
def written(what: str) -> Iterator[None]:
    """The block writes `what`, as "the adapter out". Raises InputError disk_full, output_unwritable for an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError("disk_full", f"the disk has no room for {what}. Make room") from error
        raise InputError("output_unwritable", f"{what} could not be written: {error}. Choose another folder") from error


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Replace a file of text: it holds all of the text, or what it held before. InputError where the disk fails."""
    hidden = path.with_name(f".{path.name}.writing")
    with written(str(path)):
        try:
            with hidden.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise
