"""What rank 0 tells the others to load, and how each finds it on its own disk."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_qwen35.budget.plan import most_tokens, this_machine
from mlx_qwen35.checkpoint.adapter_choice import Chosen, choose
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.hub import NANO, is_local, resolve
from mlx_qwen35.checkpoint.share import Share
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.model.model import Model

MOST_DEPTH, MOST_ROWS = 4, 8  # drafts at a time and answers at a time, that room is compared for
NEEDS = tuple((rows, depth) for rows in (1, MOST_ROWS) for depth in (0, MOST_DEPTH))


@dataclass(frozen=True)
class Opened:
    """A checkpoint with its adapters, of which no weights are read yet."""

    checkpoint: Checkpoint
    adapters: Chosen


def described(given: LoadOptions, checkpoint: Checkpoint, adapters: Chosen) -> dict[str, Any]:
    """What to open, in values that JSON can hold. checkpoint, adapters: rank 0's own."""
    name, revision = str(given.model), given.revision
    if name == NANO:
        places = [NANO]
    elif is_local(name, revision):
        places = _places(checkpoint.folder)
    else:  # the very commit that rank 0 has, where the folder tells it
        places, pinned = [name], checkpoint.folder.parent.name == "snapshots"
        revision = checkpoint.folder.name if pinned else revision
    return {
        "model": places, "revision": revision, "rope_scaling": given.rope_scaling,
        "adapters": {own: _places(adapter.path) for own, adapter in adapters.adapters.items()},
        "default": adapters.default, "adapter_scale": given.adapter_scale,
        "kv_bits": given.kv_bits, "kv_rotate": given.kv_rotate,
    }  # fmt: skip


def _places(folder: Path) -> list[str]:
    """Where another machine may have a folder: at the same path, or at the same one within its user's home."""
    path = folder.expanduser().absolute()
    home = Path.home()
    return [str(path), *([f"~/{path.relative_to(home)}"] if path.is_relative_to(home) else [])]


def open_described(told: Mapping[str, Any]) -> Opened:
    """Open what rank 0 has described. Raises InputError as `load` does; for a folder that is not here model_not_found
    or adapter_not_found, with the command that copies it.
    """
    name = _here(told["model"], "model_not_found")
    folder = resolve(name, None if len(told["model"]) > 1 or Path(name).is_dir() else told["revision"])
    checkpoint = open_checkpoint(folder, rope_scaling=told["rope_scaling"])
    found = {own: _here(places, "adapter_not_found") for own, places in told["adapters"].items()}
    default = told["default"]
    given = [f"{default}={found[default]}"] if default else found
    return Opened(checkpoint, choose(given or None, told["adapter_scale"], checkpoint))


def _here(places: list[str], code: str) -> str:
    """The first of these folders that is there; another name is left as it is."""
    if not places[0].startswith("/"):
        return places[0]
    there = [place for place in places if Path(place).expanduser().is_dir()]
    if not there:
        path = shlex.quote(f"{places[0]}/")
        raise InputError(code, f"there is no folder {places[0]}", f"Copy it there: rsync -aL {path} HOST:{path}")
    return there[0]


def share_of(checkpoint: Checkpoint, layers: range | None, rank: int, size: int) -> Share:
    """What a rank holds. layers: of a pipeline; None: the tensor split."""
    text = checkpoint.config.text
    return Share.tensor(text, rank, size) if layers is None else Share.pipeline(text, layers)


def room(model: Model, chunk: int, limit: int) -> list[int]:
    """For each of NEEDS the tokens that all rows together have room for in what a rank holds. limit: its bytes."""
    machine = this_machine(model.held, model.dtype, limit, model.kv)
    return [most_tokens(model.held, machine, chunk, [0] * rows, depth) for rows, depth in NEEDS]


def weight_bytes(model: Model) -> int:
    """Bytes of all arrays of the text model here, with what stands beside them."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return sum(array.nbytes for array in arrays.values())
