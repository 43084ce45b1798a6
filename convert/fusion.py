"""What an adapter makes of the tensors of a source, in float32, some rows at a time."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.adapter import Adapter, read_adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.fusing import fuse
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import check_fields, option, spelled
from mlx_qwen35.values import shown


def check_adapter(name: str, value: Any) -> Any:
    """The folder of the one adapter, or a list of it, as a command line gives it. InputError for anything else."""
    (one,) = value if isinstance(value, list) and len(value) == 1 else [value]
    if not isinstance(one, str | Path):
        raise InputError(
            "option_invalid",
            f"{name} must be the folder of one adapter, which is fused; got {shown(value)}. To fuse another one, "
            "convert the result again",
        )
    return value


@dataclass(frozen=True)
class AdapterOptions:
    """The adapter that is fused into the weights."""

    adapter: str | Path | list[str] | None = option(
        help="fuse an adapter into the weights: a folder of PEFT, mlx-lm or mlx-vlm", metavar="FOLDER", each=True,
        check=check_adapter,
    )  # fmt: skip
    adapter_scale: float = option(
        1.0, help="a factor of the adapter's own scale", least=-1000, most=1000, metavar="X"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.adapter is None and self.adapter_scale != 1:
            name, needed = spelled("adapter_scale"), spelled("adapter")
            raise InputError("option_no_effect", f"{name} has no effect without {needed}; add it or leave {name} out")

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of the adapter, or none."""
        given = self.adapter if isinstance(self.adapter, list) else [self.adapter] if self.adapter is not None else []
        return tuple(Path(os.path.expanduser(folder)) for folder in given)

    def read(self, checkpoint: Checkpoint) -> Adapter | None:
        """The adapter, checked against a checkpoint, see `read_adapter`; None for none."""
        return next((read_adapter(folder, checkpoint, self.adapter_scale) for folder in self.folders), None)


NO_ADAPTER = AdapterOptions()


def fused_rows(adapter: Adapter, name: str, values: np.ndarray, start: int) -> np.ndarray:
    """A tensor's rows from `start` on, (rows, columns) float32 -> what the adapter makes of them."""
    with mx.stream(mx.cpu):
        return np.asarray(fuse(adapter, name, mx.array(values), slice(start, start + len(values))))


def facts(adapter: Adapter, scale: float) -> dict[str, Any]:
    """What --json and quality.json tell of an adapter. ranks: of its maps, ascending. scale: by --adapter-scale."""
    return {
        "name": adapter.path.resolve().name,
        "format": adapter.format,
        "maps": len(adapter.pairs),
        "ranks": sorted({len(pair.a) for pair in adapter.pairs.values()}),
        "whole_tensors": len(adapter.replaced),
        "magnitudes": len(adapter.magnitudes),
        "scale": scale,
        "fingerprint": adapter.fingerprint,
    }


def described(told: Mapping[str, Any]) -> str:
    """The same in words, after the word adapter."""
    ranks = " and ".join(", ".join(map(str, told["ranks"])).rsplit(", ", 1))
    parts = {
        f"{told['maps']} maps of rank {ranks}": told["maps"],
        f"the lengths of the rows of {told['magnitudes']} of them (DoRA)": told["magnitudes"],
        f"{told['whole_tensors']} whole tensors": told["whole_tensors"],
        f"scaled by {told['scale']:g}": told["scale"] != 1,
    }
    return f"{told['name']} ({told['format']}): {', '.join(part for part, there in parts.items() if there)}"
