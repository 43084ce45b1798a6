"""Adapters written as PEFT's or mlx-lm's folders, whole or not at all."""

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint import adapter_mlx, adapter_peft
from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.adapter_parts import CONFIG
from mlx_qwen35.checkpoint.dtypes import DTYPES
from mlx_qwen35.checkpoint.folder import is_file, sync, written
from mlx_qwen35.checkpoint.names import MTP, TABLE, TEXT, VISION
from mlx_qwen35.checkpoint.tensors import open_header
from mlx_qwen35.errors import InputError

FORMATS = ("peft", "mlx-lm")
_HIDDEN = ".writing.{}"  # the end stays, to which MLX would add .safetensors
_Files = dict[str, bytes | tuple[dict[str, mx.array], dict[str, str]]]  # name -> text, or tensors and metadata


def write_adapter(
    folder: str | Path, pairs: Mapping[str, Pair], *, format: str = "peft", model: str = "", dropout: float = 0.0
) -> None:
    """Write low-rank parts as an adapter's folder, which may be there: its other files stay.

    pairs: as in `Adapter`: Hugging Face name of a weight -> A (r, in), B (out, r) and scale; float32, float16 or
        bfloat16, which is kept. Ranks and scales may differ. The draft head's, mtp..., are written to a file of their
        own, mtp_adapter.safetensors, which only this package reads; without any, one that is there is removed.
    format: "peft", which peft loads into transformers' Qwen3_5ForConditionalGeneration (AutoModelForImageTextToText;
        Qwen3_5ForCausalLM has other names); or "mlx-lm", for that and mlx-vlm, which has neither vision nor the table
        of tokens.
    model: the id or folder of the model that it is for, noted. dropout: of training, noted.

    A process that ends at any moment leaves the old adapter, the new one, or a folder without tensors, which nobody
    takes for an adapter: never the numbers of one with the scale of another.

    Raises InputError: adapter_unsupported for what the format cannot hold; output_unwritable; disk_full.
    """
    own = {name: pair for name, pair in pairs.items() if not name.startswith(MTP)}
    assert format in FORMATS and own, "a known format, and low-rank parts that are not the draft head's alone"
    files = _peft(own, model, dropout) if format == "peft" else _mlx(own, model, dropout)
    if head := {name: pair for name, pair in pairs.items() if name.startswith(MTP)}:
        files |= _draft_head(head)
    with written(f"the adapter {folder}"):
        _put(Path(folder).expanduser(), files)


# --- the formats -----------------------------------------------------------------------------------------------------


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _peft(pairs: Mapping[str, Pair], model: str, dropout: float) -> _Files:
    """Modules by their whole names, so that peft puts low-rank parts nowhere else."""
    settings = {name: (len(pair.a), _neat(pair.scale * len(pair.a))) for name, pair in pairs.items()}
    (rank, alpha), _ = Counter(settings.values()).most_common(1)[0]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model or None, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_alpha": alpha,
        "lora_dropout": dropout, "modules_to_save": None, "r": rank, "use_dora": False, "use_rslora": False,
        "rank_pattern": {_module(name): own for name, (own, _) in settings.items() if own != rank},
        "alpha_pattern": {_module(name): own for name, (_, own) in settings.items() if own != alpha},
        "target_modules": sorted(map(_module, pairs)),
    }  # fmt: skip
    return {adapter_peft.TENSORS: (_peft_tensors(pairs), {"format": "pt"}), CONFIG: _json(config)}


def _peft_tensors(pairs: Mapping[str, Pair]) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for name, pair in pairs.items():
        path = adapter_peft.PREFIX + _module(name)
        if name == TABLE:
            tensors |= {f"{path}.lora_embedding_A": pair.b.T, f"{path}.lora_embedding_B": pair.a.T}
        else:
            tensors |= {f"{path}.lora_A.weight": pair.a, f"{path}.lora_B.weight": pair.b}
    return tensors


def _neat(alpha: float) -> float:
    """Alpha as a whole number where it is one, but for the last bits of scale times rank."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _mlx(pairs: Mapping[str, Pair], model: str, dropout: float) -> _Files:
    if beyond := [name for name in pairs if name.startswith(VISION) or not name.startswith(f"{TEXT}layers.")]:
        raise InputError(
            "adapter_unsupported",
            f"mlx-lm's adapters are of the text model's layers; this one is for {beyond[0]} too. Write it as peft",
        )
    rank, scale, pairs = _alike(pairs)
    tensors: dict[str, mx.array] = {}
    modules = {name: f"language_model.model.{_module(name).removeprefix(TEXT)}" for name in pairs}
    for name, pair in pairs.items():
        tensors |= {f"{modules[name]}.lora_a": pair.a.T, f"{modules[name]}.lora_b": pair.b.T}
    own = {"rank": rank, "scale": scale, "dropout": dropout, "keys": sorted(modules.values())}
    config = {"model": model, "fine_tune_type": "lora", "num_layers": -1, "lora_parameters": own}
    return {adapter_mlx.TENSORS: (tensors, {"format": "mlx"}), CONFIG: _json(config)}


def _draft_head(pairs: Mapping[str, Pair]) -> _Files:
    rank, scale, pairs = _alike(pairs)
    metadata = {"format": "pt", "rank": str(rank), "alpha": repr(_neat(scale * rank))}
    return {adapter_peft.DRAFT_HEAD: (_peft_tensors(pairs), metadata)}


def _alike(pairs: Mapping[str, Pair]) -> tuple[int, float, dict[str, Pair]]:
    """Rank and scale of all pairs, which are filled up with zeros and multiplied where they have others."""
    rank = max(len(pair.a) for pair in pairs.values())
    scale, _ = Counter(pair.scale for pair in pairs.values()).most_common(1)[0]
    made = {}
    for name, (a, b, own) in pairs.items():
        short = rank - len(a)
        a, b = mx.pad(a, [(0, short), (0, 0)]), mx.pad(b, [(0, 0), (0, short)])
        made[name] = Pair(a, b if own == scale else (b * (own / scale)).astype(b.dtype), scale)
    return rank, scale, made


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


# --- the files -------------------------------------------------------------------------------------------------------


def _put(folder: Path, files: _Files) -> None:
    """Write hidden files and give them their names.

    Where the configuration changes, the old tensors go before it does, and the new ones come after it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hidden = {name: folder / _HIDDEN.format(name) for name in files}
    try:
        for name, content in files.items():
            _write(hidden[name], content)
        stale = {adapter_peft.TENSORS, adapter_mlx.TENSORS, adapter_peft.DRAFT_HEAD} - set(files)
        old = folder / CONFIG
        if not (is_file(old) and CONFIG in files and old.read_bytes() == files[CONFIG]):
            stale |= {adapter_peft.TENSORS, adapter_mlx.TENSORS}
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        for name in sorted(files, key=lambda name: name != CONFIG):
            os.replace(hidden[name], folder / name)
        sync(folder)
    finally:
        for path in hidden.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _write(path: Path, content: bytes | tuple[dict[str, mx.array], dict[str, str]]) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        arrays, metadata = content
        assert {array.dtype for array in arrays.values()} <= set(DTYPES.values()), "floating point numbers"
        arrays = {name: mx.contiguous(array) for name, array in arrays.items()}
        try:
            mx.save_safetensors(str(path), arrays, metadata)
            open_header(path)  # tells a file that is cut
        except (RuntimeError, InputError) as error:
            raise OSError(errno.ENOSPC if _is_full(path) else errno.EIO, str(error)) from error
    sync(path)


def _is_full(path: Path) -> bool:
    status = os.statvfs(path.parent)
    return status.f_bavail * status.f_frsize < 1 << 20
