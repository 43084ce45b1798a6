"""Room on the disk for a conversion."""

import shutil
from pathlib import Path

from mlx_qwen35.checkpoint.converted import hidden
from mlx_qwen35.errors import InputError

MARGIN = 200 << 20  # bytes that stay free while a source is downloaded: its tokenizer, the journal, other programs


def check_space(nbytes: int, target: Path, download: int = 0) -> None:
    """InputError unless the target's disk has room for `nbytes`, and for `download` of its source while it is made.

    What an unfinished conversion has written and downloaded counts as room.
    """
    free = free_bytes(target)
    left = hidden(target)[: 2 if download else 1]
    there = sum(512 * path.stat().st_blocks for folder in left for path in folder.rglob("*.safetensors*"))
    need = nbytes + (download + MARGIN if download else 0)
    if free + there < need:
        beside = f", {download / 1e9:.2f} GB of them for a file of the source at a time" if download else ""
        raise InputError(
            "disk_full",
            f"{target} needs {need / 1e9:.2f} GB{beside}, and its disk has {free / 1e9:.2f} GB free. Make room",
        )


def free_bytes(target: Path) -> int:
    """What is free on the disk of a folder that need not exist."""
    return shutil.disk_usage(next(folder for folder in target.parents if folder.is_dir())).free
