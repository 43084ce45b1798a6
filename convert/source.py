"""What may be converted: raw Hugging Face folders, FP8 ones, and folders of MLX programs, quantized or not.

A Tensor is one weight in Hugging Face's layout, whatever stands for it in the files. Those that are stored as such are
read as they are; packed, FP8 and folded ones are computed, rows by rows, in float32.
"""

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.draft_head import settled
from mlx_qwen35.checkpoint.dtypes import DTYPES, STORED
from mlx_qwen35.checkpoint.folder import safetensors_files
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.checkpoint.shapes import is_matrix, mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.checkpoint.tensors import Entry
from mlx_qwen35.convert.packing import brief
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import read_json
from mlx_qwen35.quantization import Quantization
from mlx_qwen35.values import shown

FLOATS = {stored: DTYPES[name] for name, stored in STORED.items()}
BITS = {
    "F16": np.uint16, "BF16": np.uint16, "F32": np.uint32, "F64": np.uint64, "U32": np.uint32, "U8": np.uint8,
    "F8_E4M3": np.uint8,
}  # fmt: skip
CLAIMS = ("quantization", "quantization_config")  # where config.json says that weights are quantized
_BLOCK = (128, 128)  # weights that share a factor in FP8 folders, unless config.json says otherwise


def e4m3() -> np.ndarray:
    """(256,) float32: the value of every FP8 code of sign, 4 bits of exponent, 3 of mantissa. The last one is NaN."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.ldexp(mantissa + 8.0 * (exponent > 0), np.maximum(exponent, 1) - 10)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_E4M3 = e4m3()


@dataclass(frozen=True)
class Tensor:
    """One weight of the source, in Hugging Face's layout.

    parts: the weight alone; with the scales, and the biases of affine mode, when it is packed; with the factors of its
    blocks when it is FP8. how: of a packed one. block: (rows, columns) of an FP8 one. folded: a norm to which the one
    was added. last: a convolution with its input channels on the last axis.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Entry, ...]
    how: Quantization | None = None
    block: tuple[int, int] | None = None
    folded: bool = False
    last: bool = False

    @property
    def stored_name(self) -> str:
        return self.parts[0].stored_name

    @property
    def dtype(self) -> str:
        """Of the values as they are read."""
        stored = self.parts[0].dtype
        return "F32" if self.how or self.block or self.folded or stored == "F64" else stored

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def width(self) -> int:
        """Values of a row, which is all that one index of the first axis stands for."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Source:
    """A folder to convert: its tensors by Hugging Face names in the order of the data, and its files as found.

    config: of config.json, without what other programs say there of the draft head alone, and with whether the logits
    matrix is the embedding as the tensors have it.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple["Found", ...]

    @property
    def nested(self) -> bool:
        """Whether the text model is a part of a whole with a vision tower, and named as such."""
        return "text_config" in self.config


@dataclass(frozen=True)
class Found:
    """A file as it was when the plan was made."""

    path: Path
    nbytes: int
    time: int  # of the last change of its content: nanoseconds

    @classmethod
    def at(cls, path: Path) -> "Found":
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """InputError when a file of the source, in this folder, cannot be read."""
    try:
        yield
    except OSError as error:
        raise InputError(
            "source_unreadable",
            f"every file of the source must be readable; {error.filename or folder} is not ({error.strerror}). Check "
            "its permissions and the disk",
        ) from error


def check_readable(files: tuple[Found, ...]) -> None:
    """OSError when one of the files cannot be read."""
    for file in files:
        file.path.open("rb").close()


def check_unchanged(files: tuple[Found, ...]) -> None:
    """InputError when a file of the source is not what it was when the plan was made."""
    for file in files:
        if not file.path.is_file() or Found.at(file.path) != file:
            raise InputError(
                "source_changed",
                f"the source must stay as it is until the conversion ends; {file.path} has changed. Convert again",
            )


# --- opening ---------------------------------------------------------------------------------------------------------


def open_source(folder: Path) -> Source:
    """Read headers and configuration. InputError when the folder is broken or of a kind that is not converted.

    Warns of a draft head beside the trunk that cannot be used, and goes without it.
    """
    files = tuple(Found.at(file) for file in safetensors_files(folder)) if folder.is_dir() else ()
    checkpoint = open_checkpoint(folder, fp8=True)
    if checkpoint.mtp_head_fault:
        why = checkpoint.mtp_head_fault
        warnings.warn(f"{folder} is converted without a draft head: {why}", UserWarning, stacklevel=2)
    beside = {entry.file for entry in checkpoint.entries.values()} - {file.path for file in files}
    files += tuple(map(Found.at, sorted(beside)))
    config = read_json(folder / "config.json")
    claims = [part.get(key) for part in (config, config.get("text_config") or {}) for key in CLAIMS]
    claim = next((found for found in claims if found), None)
    block = _block(folder, claim, checkpoint) if checkpoint.block_scales else None
    text = checkpoint.config
    shapes = text_shapes(text.text) | (vision_shapes(text.vision) if text.vision else {}) | mtp_shapes(text.text)
    present = {name: shape for name, shape in shapes.items() if name in checkpoint.entries}
    tensors = {name: _tensor(checkpoint, name, shape, block) for name, shape in present.items()}
    if claim and not any(tensor.how or tensor.block for tensor in tensors.values()):
        raise InputError(
            "quantization_unsupported",
            f"config.json of a quantized source must tell how; {folder} says {brief(claim)} and its tensors are not "
            "quantized in a way that is read here (FP8 with block scales, or packed by an MLX program). Give the "
            "original checkpoint",
        )
    packed = {name: tensor.how for name, tensor in tensors.items() if name.startswith(MTP) and tensor.how}
    return Source(checkpoint, _with_tie(settled(config, packed), text.text.tie_word_embeddings), tensors, files)


def _with_tie(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """config.json's values that say what is true of the tensors, where transformers looks and where MLX programs do."""
    config = {**config, "tie_word_embeddings": tied}
    if "tie_word_embeddings" in (config.get("text_config") or {}):
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": tied}
    return config


def _block(folder: Path, claim: Any, checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns of a block, once config.json and the shapes of the factors agree."""
    if not isinstance(claim, dict) or claim.get("quant_method") != "fp8":
        raise InputError(
            "quantization_unsupported",
            f"FP8 weights need a quantization_config of quant_method 'fp8' in config.json; {folder} has {brief(claim)}",
        )
    size = claim.get("weight_block_size", _BLOCK)
    if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise InputError(
            "config_field_invalid",
            f"weight_block_size must be [rows, columns]; config.json of {folder} has {shown(size)}",
        )
    for name, scales in checkpoint.block_scales.items():
        weight = checkpoint.entries.get(name)
        shape = tuple(-(-n // block) for n, block in zip(weight.shape, size, strict=False)) if weight else None
        fits = weight is not None and (len(weight.shape), weight.dtype) == (2, "F8_E4M3")
        if not fits or scales.shape != shape or scales.dtype not in FLOATS:
            raise InputError(
                "tensors_mismatch",
                f"factors of FP8 blocks must be one for each {size[0]} x {size[1]} of an F8_E4M3 matrix; "
                f"{scales.stored_name} is {list(scales.shape)} {scales.dtype} and its weight is "
                f"{f'{weight.dtype} {list(weight.shape)}' if weight else 'absent'}. Download the source again",
            )
    return tuple(size)


def _tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> Tensor:
    entry, how = checkpoint.fp32_original.get(name, checkpoint.entries[name]), checkpoint.quantization(name)
    if is_matrix(name, shape) and how:
        stem = name.removesuffix("weight")
        parts = tuple(checkpoint.entries[stem + suffix] for suffix in how.parts(shape))
        return Tensor(name, shape, parts, how)
    if name in checkpoint.block_scales:
        return Tensor(name, shape, (entry, checkpoint.block_scales[name]), block=block)
    if checkpoint.raw:
        return Tensor(name, shape, (entry,))
    last = name.endswith("patch_embed.proj.weight")
    return Tensor(name, shape, (entry,), folded=checkpoint.is_folded(name), last=last)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_rows(part: Entry, start: int, stop: int, files: Mapping[Path, int]) -> np.ndarray:
    """Rows start <= row < stop of a stored tensor as unsigned integers of its width: (rows, the other axes as one)."""
    row = part.nbytes // part.shape[0]
    with reading(part.file):
        data = os.pread(files[part.file], (stop - start) * row, part.start + start * row)
    if len(data) != (stop - start) * row:
        raise InputError(
            "source_changed", f"{part.file} ended in the middle of {part.stored_name}: it changed while it was read"
        )
    return np.frombuffer(data, BITS[part.dtype]).reshape(stop - start, -1)


def as_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of bits read from a tensor of this dtype: F64, F32, F16 or BF16."""
    if dtype == "F64":
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
            return bits.view(np.float64).astype(np.float32)
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def unpack(parts: list[np.ndarray], dtypes: list[str], how: Quantization, stream: mx.Stream) -> np.ndarray:
    """(rows, columns) float32: what packed rows stand for, in float32 arithmetic on what is stored."""
    numbers = [
        mx.array(part if dtype in ("U8", "U32") else as_float32(part, dtype))
        for part, dtype in zip(parts, dtypes, strict=True)
    ]
    options = {"group_size": how.group_size, "bits": how.bits, "mode": how.mode, "stream": stream}
    return np.asarray(mx.dequantize(*numbers, dtype=mx.float32, **options))


def read_values(tensor: Tensor, start: int, stop: int, files: Mapping[Path, int], stream: mx.Stream) -> np.ndarray:
    """Rows of a tensor as bits of tensor.dtype, in Hugging Face's layout: (rows, the other axes as one)."""
    parts = [read_rows(part, start, stop, files) for part in tensor.parts if not tensor.block]
    if tensor.block:
        return _fp8(tensor, start, stop, files).view(np.uint32)
    if tensor.how:
        return unpack(parts, [part.dtype for part in tensor.parts], tensor.how, stream).view(np.uint32)
    bits, dtype = parts[0], tensor.parts[0].dtype
    if dtype == "F64":
        bits, dtype = as_float32(bits, dtype).view(np.uint32), "F32"
    if tensor.last:
        channels = tensor.shape[1]
        bits = np.ascontiguousarray(bits.reshape(len(bits), -1, channels).swapaxes(1, 2)).reshape(len(bits), -1)
    if tensor.folded:
        return (as_float32(bits, dtype) - np.float32(1)).view(np.uint32)
    return bits


def _fp8(tensor: Tensor, start: int, stop: int, files: Mapping[Path, int]) -> np.ndarray:
    weight, scales = tensor.parts
    high, wide = tensor.block
    first = start // high
    factors = as_float32(read_rows(scales, first, -(-stop // high), files), scales.dtype)
    values = _E4M3[read_rows(weight, start, stop, files)]
    rows = np.repeat(factors[np.arange(start, stop) // high - first], wide, axis=1)
    values *= rows[:, : values.shape[1]]
    return values
