"""The tensors of an adapter's files by Hugging Face's names of weights, whichever program wrote them.

The readers of the formats make `Parts`. What is the same for all, shapes and numbers, `adapter.py` checks.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlx_qwen35.checkpoint.folder import is_file, names_in, shorten
from mlx_qwen35.checkpoint.tensors import Entry, Header, open_header
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import read_json

CONFIG = "adapter_config.json"

# The kinds of an adapter's tensors. BASE: what the trained weight was before, which PEFT stores for tables of tokens.
A, B, MAGNITUDE, BASE, WHOLE = "A", "B", "magnitude", "base", "whole"
LOW_RANK = (A, B, MAGNITUDE)


class Stored(NamedTuple):
    """A tensor in a file. transposed: against the shapes of `adapter.Pair`."""

    entry: Entry
    transposed: bool = False


class Declared(NamedTuple):
    """Rank and scale of a low-rank part, as the configuration has them."""

    rank: int
    scale: float


@dataclass
class Parts:
    """What an adapter holds.

    tensors: by the weight's Hugging Face name and the kind; names that are unknown stay as they are stored.
    declared: of the weights with low-rank parts. mlx: an MLX program wrote it. Then whole tensors are in MLX's layout,
    and low-rank parts of the table of tokens are those of a tied head too. dora: each low-rank part has magnitudes.
    """

    folder: Path
    format: str
    mlx: bool
    dora: bool
    tensors: dict[tuple[str, str], Stored] = field(default_factory=dict)
    declared: dict[str, Declared] = field(default_factory=dict)

    def add(self, name: str, kind: str, stored: Stored, declared: Declared | None = None) -> None:
        """One more tensor. declared: of a low-rank one. InputError where it is there already."""
        if (name, kind) in self.tensors:
            names = f"{self.tensors[name, kind].entry.stored_name} and {stored.entry.stored_name}"
            raise invalid(self.folder, f"two of its tensors are for the same weight: {names}")
        self.tensors[name, kind] = stored
        if declared:
            self.declared[name] = declared


def invalid(folder: Path, fault: str) -> InputError:
    return InputError("adapter_invalid", f"the adapter {folder} cannot be read: {fault}. Download or save it again")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """InputError adapter_invalid for whatever is wrong with one of its files."""
    try:
        yield
    except InputError as error:
        if error.code.startswith("adapter_"):
            raise
        raise invalid(folder, error.fault.rstrip(".")) from error
    except OSError as error:
        raise invalid(folder, f"{error.filename or folder}: {error.strerror}") from error


def config_of(folder: Path) -> Mapping[str, Any]:
    """The values of adapter_config.json. InputError where there is no adapter, or no such file."""
    if not os.path.isdir(folder):
        file = is_file(folder)
        raise InputError(
            "adapter_not_found",
            f"an adapter must be a folder with {CONFIG}; {folder} is {'a file' if file else 'not there'}",
            "Give its folder" if file else "One of the hub is downloaded first: hf download ID --local-dir FOLDER",
        )
    with reading(folder):
        if is_file(folder / CONFIG):
            return read_json(folder / CONFIG)
        names = names_in(folder)
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors and "config.json" not in names:
        raise invalid(folder, f"it has {shorten(tensors, 3)} and no {CONFIG}, which has the scale")
    kind = "It holds a model, and no adapter" if "config.json" in names else "Give the folder that has it"
    raise InputError("adapter_not_found", f"an adapter's folder must hold {CONFIG}, and {folder} has none. {kind}")


def header_of(folder: Path, *files: str) -> Header:
    """What the first of these files that is there says of itself. InputError where there is none."""
    with reading(folder):
        file = next((folder / name for name in files if is_file(folder / name)), None)
        if file:
            header = open_header(file)
            if not header.entries:
                raise invalid(folder, f"{file.name} holds no tensors")
            return header
        names = [name for name in names_in(folder) if name != CONFIG]
    raise InputError(
        "adapter_not_found",
        f"the adapter {folder} must have its tensors in {' or '.join(files)}; beside {CONFIG} it has "
        f"{shorten(names, 4) if names else 'nothing'}. Download it whole, or save it again",
    )

