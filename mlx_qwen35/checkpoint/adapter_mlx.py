"""The adapters of mlx-lm 0.32 and mlx-vlm 0.7, and mlx-vlm's earlier form, in the names of the models there.

Factors are transposed against PEFT's: lora_a (in, r), lora_b (r, out). The scale is the factor itself. Whole tensors
are in MLX's layout, norms with the one added.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.adapter_parts import (
    CONFIG,
    MAGNITUDE,
    WHOLE,
    A,
    B,
    Declared,
    Parts,
    Stored,
    header_of,
    invalid,
    reading,
)
from mlx_qwen35.checkpoint.names import TABLE, TEXT, hugging_face_name
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import WIDTH, Fields
from mlx_qwen35.values import shown

TENSORS = "adapters.safetensors"
_FILES = (TENSORS, "weights.safetensors")
_LEGACY = "rank", "alpha"  # at the top of mlx-vlm's earlier configuration
_ENDS = {".lora_a": A, ".lora_b": B, ".m": MAGNITUDE, ".A": A, ".B": B}


def is_one(config: Mapping[str, Any]) -> bool:
    """Whether this is the configuration of an MLX program's adapter."""
    return "lora_parameters" in config or "fine_tune_type" in config or "rank" in config


def parts_of(folder: Path, config: Mapping[str, Any], layers: int) -> Parts:
    """The adapter in a folder of mlx-lm or mlx-vlm. layers: of the model.

    InputError: adapter_not_found, adapter_invalid, adapter_unsupported.
    """
    entries = header_of(folder, *_FILES).entries
    with reading(folder):
        fields = Fields(config, CONFIG)
        kind = fields.get("fine_tune_type", str) if fields.has("fine_tune_type") else "lora"
        if kind not in ("lora", "dora", "full"):
            raise InputError(
                "adapter_unsupported",
                f"the adapter {folder} must be lora, dora or full by its fine_tune_type, got {shown(kind)}",
            )
        own = Fields(fields.object("lora_parameters") or {}, "lora_parameters")
        keys = own.get("keys", list) if own.has("keys") else None
        vlm = "model" not in config  # mlx-lm notes all options of its command
        parts = Parts(folder, "mlx-vlm" if vlm else "mlx-lm", mlx=True, dora=kind == "dora")
        trained = _Trained(folder, keys, fields.whole("num_layers", -1, WIDTH, absent=-1), layers)
        declared = None if kind == "full" else _declared(fields, own)
        for stored, entry in entries.items():
            module, dot, end = stored.rpartition(".")
            role = _ENDS.get(dot + end) if declared else None
            name = hugging_face_name(f"{module}.weight" if role else stored)
            if not role:
                parts.add(name, WHOLE, Stored(entry))
                continue
            trained.check(module, name)
            if name == TABLE and role != MAGNITUDE:  # lora_a has a row for each token
                parts.add(name, B if role == A else A, Stored(entry), declared)
            else:
                parts.add(name, role, Stored(entry, transposed=role != MAGNITUDE), declared)
    return parts


def _declared(fields: Fields, own: Fields) -> Declared:
    """Rank and scale of all modules."""
    if own.values:
        return Declared(own.whole("rank", 1, WIDTH), own.number("scale", -1e9, 1e9))
    rank = fields.whole("rank", 1, WIDTH)
    return Declared(rank, fields.number("alpha", -1e9, 1e9, absent=0.1) / rank)


class _Trained:
    """The modules that the configuration names: in the last layers, or by their whole names.

    Tensors of others are a sign that they are of an earlier run: mlx-lm writes the configuration first.
    """

    def __init__(self, folder: Path, keys: list[Any] | None, count: int, layers: int):
        self._folder, self._keys = folder, keys
        self._first = layers - count if count > 0 else 0
        self._count = count

    def check(self, stored: str, name: str) -> None:
        """InputError for a module that is not among them. name: its weight's."""
        if self._keys is not None and stored in self._keys:
            return
        index, _, inner = name.removeprefix(f"{TEXT}layers.").removesuffix(".weight").partition(".")
        if not (name.startswith(f"{TEXT}layers.") and index.isdecimal()):
            if self._keys is None:
                return
        elif int(index) >= self._first and (self._keys is None or inner in self._keys):
            return
        raise invalid(
            self._folder,
            f"it holds {stored[:200]}, which is not among the modules that {CONFIG} names (num_layers "
            f"{self._count}, keys {shown(self._keys)}); the two files may be of different runs",
        )
