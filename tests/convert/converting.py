"""The conversion with every option of plan, target and writing, as the tests of these call it."""

import ctypes
import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.names import hugging_face_name, is_zero_centred
from mlx_qwen35.convert.card import CARD, PLOT, QUALITY
from mlx_qwen35.convert.fusion import NO_ADAPTER, AdapterOptions
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.convert.space import check_space
from mlx_qwen35.convert.stream import Report, write
from mlx_qwen35.convert.target import appearing_whole


def converted(
    source: Path,
    target: Path,
    *,
    resume: bool = False,
    verify: bool = True,
    statistics: Mapping[str, np.ndarray] | None = None,
    adapter: AdapterOptions = NO_ADAPTER,
    **options: Any,
) -> Report:
    """The report of a conversion; options are those of StorageOptions, statistics as in ConversionPlan."""
    plan = replace(make_plan(source, StorageOptions(**options), adapter), statistics=statistics or {})
    with appearing_whole(target, False, resume) as folder:
        check_space(plan.nbytes, target)
        return write(plan, folder, verify=verify)


def cannot_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has no call that exchanges two names."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())


def nearest(source: Path, target: Path, **options: Any) -> Path:
    """A folder whose matrices are packed by mx.quantize."""
    converted(source, target, rounding="nearest", **options)
    return target


def unpacked(source: Path, target: Path, **options: Any) -> Path:
    """A folder in which everything is as in the source, or in the dtype asked for, and nothing is packed anew."""
    converted(source, target, **options)
    return target


def arrays_of(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder by their stored names."""
    return {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}


def mlx_layout(source: Path, target: Path) -> Path:
    """A raw checkpoint as MLX programs rewrite it: their names, conv1d [C, K, 1], one added to norms in their dtype."""
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    arrays = {}
    for name, array in arrays_of(source).items():
        if name.endswith("conv1d.weight"):
            array = array.swapaxes(1, 2)
        elif name.endswith("patch_embed.proj.weight"):
            array = mx.moveaxis(array, 1, 4)
        elif is_zero_centred(hugging_face_name(name)):
            array = array + 1
        for own, theirs in (("model.language_model.", "language_model.model."), ("model.visual.", "vision_tower.")):
            name = theirs + name.removeprefix(own) if name.startswith(own) else name
        arrays[name] = mx.contiguous(array)
    mx.save_safetensors(str(target / "model.safetensors"), arrays, metadata={"format": "mlx"})
    return target


def save(file: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file of any dtype: name -> (its dtype's name, an array with the bytes and the shape)."""
    header, position = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (position, position + array.nbytes)}
        position += array.nbytes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for _, a in tensors.values()))


def raw_bits(array: mx.array) -> tuple[str, np.ndarray]:
    """A 16-bit or 32-bit float array for `save`."""
    name = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}[array.dtype]
    return name, np.array(mx.view(array, mx.uint32 if array.itemsize == 4 else mx.uint16))


def fp8_folder(source: Path, target: Path, scales: mx.Dtype = mx.float32, block: int = 128) -> Path:
    """A raw checkpoint with the layers' matrices in FP8 as Qwen publishes them: one factor for each block.

    The embedding, in_proj_a, in_proj_b, the vision tower and the draft head's fc stay as they are.
    """
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    kept = ["lm_head", "model.language_model.embed_tokens", "model.visual", "mtp.fc"]
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [block, block],
        "modules_to_not_convert": kept,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, array in arrays_of(source).items():
        if array.ndim != 2 or name.startswith(tuple(kept)) or "in_proj_a" in name or "in_proj_b" in name:
            tensors[name] = raw_bits(array)
            continue
        rows, columns = array.shape
        sides = [(0, -rows % block), (0, -columns % block)]
        blocks = mx.pad(array.astype(mx.float32), sides).reshape(-(-rows // block), block, -(-columns // block), block)
        factors = (mx.abs(blocks).max((1, 3)) / 448).astype(scales)
        scaled = (blocks / factors.astype(mx.float32)[:, None, :, None]).reshape(rows + sides[0][1], -1)
        tensors[name] = ("F8_E4M3", np.array(mx.to_fp8(scaled[:rows, :columns])))
        tensors[f"{name}_scale_inv"] = raw_bits(factors)
    save(target / "model.safetensors", tensors)
    return target


def files_of(folder: Path) -> dict[str, bytes]:
    """What a folder holds but for its card, which names the folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in (CARD, QUALITY, PLOT)}
