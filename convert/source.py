"""The source of a conversion: a raw Hugging Face folder, an FP8 one, or a folder of an MLX program, quantized or not.

A Tensor is one weight in Hugging Face's layout. Quantized and FP8 weights, norms with the one added, and what an
adapter changes are computed in float32, some rows at a time; all others are read as they are stored.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.draft_head import settled
from mlx_qwen35.checkpoint.dtypes import DTYPES, STORED
from mlx_qwen35.checkpoint.folder import safetensors_files
from mlx_qwen35.checkpoint.fusing import with_own_head
from mlx_qwen35.checkpoint.names import HEAD, MTP, TABLE, is_zero_centred
from mlx_qwen35.checkpoint.rope_fields import rescaled
from mlx_qwen35.checkpoint.shapes import is_matrix
from mlx_qwen35.checkpoint.tensors import Entry, read_bytes
from mlx_qwen35.convert.fp8 import block_of, brief, decode
from mlx_qwen35.convert.fusion import NO_ADAPTER, AdapterOptions, facts, fused_rows
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import read_json
from mlx_qwen35.quantization import Quantization

FLOATS = {stored: DTYPES[name] for name, stored in STORED.items()}
BITS = {
    "F16": np.uint16, "BF16": np.uint16, "F32": np.uint32, "F64": np.uint64, "U32": np.uint32, "U8": np.uint8,
    "F8_E4M3": np.uint8,
}  # fmt: skip
CLAIMS = ("quantization", "quantization_config")  # where config.json says that weights are quantized


@dataclass(frozen=True)
class Tensor:
    """One weight of the source, in Hugging Face's layout.

    parts: the weight as stored; quantized, with scales and, in affine mode, biases; in FP8, with the factors of its
    blocks. block: (rows, columns) of an FP8 block. folded: a norm to which the one was added. channels_last: a
    convolution with its input channels on the last axis. adapter: that changes it.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Entry, ...]
    quantization: Quantization | None = None
    block: tuple[int, int] | None = None
    folded: bool = False
    channels_last: bool = False
    adapter: Adapter | None = None

    @property
    def is_fused(self) -> bool:
        """Whether a low-rank part is added to what is stored."""
        return self.adapter is not None and self.name in self.adapter.pairs

    @property
    def is_table_of_adapter(self) -> bool:
        """Whether it is a table of tokens that the adapter's folder holds: the source's again, or in its place."""
        return self.adapter is not None and self.name in self.adapter.stored and self.name in (TABLE, HEAD)

    @property
    def stored(self) -> "Tensor":
        """The tensor without a low-rank part."""
        return replace(self, adapter=None)

    @property
    def stored_name(self) -> str:
        return self.parts[0].stored_name

    @property
    def dtype(self) -> str:
        """The dtype of the values that read_values gives."""
        stored = self.parts[0].dtype
        computed = self.quantization or self.block or self.folded or self.is_fused
        return "F32" if computed or stored == "F64" else stored

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def width(self) -> int:
        """The number of values of a row, which is everything at one index of the first axis."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when the plan was made."""

    path: Path
    nbytes: int
    modified: int  # nanoseconds

    @classmethod
    def at(cls, path: Path) -> "SourceFile":
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Source:
    """A folder to convert.

    config: the values of config.json, without other programs' fields of the draft head, and with tie_word_embeddings
    as the tensors have it. tensors: by Hugging Face name, in the order of the data. files: the files of weights.
    adapter: what is told of the adapter that changes some tensors, see `facts`.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[SourceFile, ...]
    adapter: Mapping[str, Any] | None = None

    @property
    def nested(self) -> bool:
        """Whether the text model's tensors have the names that they have beside a vision encoder."""
        return "text_config" in self.config


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


def check_readable(files: tuple[SourceFile, ...]) -> None:
    """OSError when one of the files cannot be read."""
    for file in files:
        file.path.open("rb").close()


def check_unchanged(files: tuple[SourceFile, ...]) -> None:
    """InputError when a file of the source is not what it was when the plan was made."""
    for file in files:
        if not file.path.is_file() or SourceFile.at(file.path) != file:
            raise InputError(
                "source_changed",
                f"the source must stay as it is until the conversion ends; {file.path} has changed. Convert again",
            )


# --- opening ---------------------------------------------------------------------------------------------------------


def open_source(folder: Path, rope_scaling: str | None = None, options: AdapterOptions = NO_ADAPTER) -> Source:
    """Read headers, configuration and the adapter. InputError when one is broken or of a kind that is not converted.

    rope_scaling: in place of the folder's. Warns where a draft head in a file of its own cannot be used, which is left
    out.
    """
    files = tuple(map(SourceFile.at, safetensors_files(folder) if folder.is_dir() else ()))
    checkpoint = open_checkpoint(folder, fp8=True, rope_scaling=rope_scaling)
    adapter = options.read(checkpoint)
    checkpoint = with_own_head(checkpoint, adapter)
    if why := checkpoint.mtp_head_fault:
        warnings.warn(f"{folder} is converted without a draft head: {why}", UserWarning, stacklevel=2)
    beside = {entry.file for entry in checkpoint.entries.values()} - {file.path for file in files}
    files += tuple(map(SourceFile.at, sorted(beside)))
    config = rescaled(read_json(folder / "config.json"), rope_scaling)
    claims = [part.get(key) for part in (config, config.get("text_config") or {}) for key in CLAIMS]
    claim = next(filter(None, claims), None)
    block = block_of(folder, claim, checkpoint) if checkpoint.block_scales else None
    tensors = {name: _tensor(checkpoint, name, shape, block) for name, shape in checkpoint.shapes.items()}
    if claim and not any(tensor.quantization or tensor.block for tensor in tensors.values()):
        raise InputError(
            "quantization_unsupported",
            f"the tensors of a quantized source must be FP8 with block scales or quantized by an MLX program; those of "
            f"{folder} are neither, and its config.json says {brief(claim)}. Give the original checkpoint",
        )
    mtp = {name: t.quantization for name, t in tensors.items() if name.startswith(MTP) and t.quantization}
    config = _with_tie(settled(config, mtp), checkpoint.config.text.tie_word_embeddings)
    if adapter:
        tensors |= _adapted(tensors, adapter)
        files += tuple(map(SourceFile.at, sorted({entry.file for entry in adapter.stored.values()})))
    told = facts(adapter, options.adapter_scale) if adapter else None
    return Source(checkpoint, config, tensors, files, told)


def _with_tie(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """config.json's values with tie_word_embeddings set, where transformers reads it and where MLX programs do."""
    config = {**config, "tie_word_embeddings": tied}
    if "tie_word_embeddings" in (config.get("text_config") or {}):
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": tied}
    return config


def _tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> Tensor:
    entry, quantization = checkpoint.entries[name], checkpoint.quantization(name)
    if quantization and is_matrix(name, shape):
        stem = name.removesuffix("weight")
        stored = tuple(checkpoint.entries[stem + suffix] for suffix in quantization.parts(shape))
        return Tensor(name, shape, stored, quantization)
    if name in checkpoint.block_scales:
        return Tensor(name, shape, (entry, checkpoint.block_scales[name]), block=block)
    channels_last = not checkpoint.raw and name.endswith("patch_embed.proj.weight")
    parts = (checkpoint.fp32_original.get(name, entry),)
    return Tensor(name, shape, parts, folded=checkpoint.is_folded(name), channels_last=channels_last)


def _adapted(tensors: Mapping[str, Tensor], adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an adapter changes. A pair of a head that is the table has nothing to change beside it."""
    for name in [name for name in tensors if name in adapter.stored or name in adapter.pairs]:
        tensor = tensors[name]
        if name in adapter.stored:
            mlx, parts = adapter.format != "peft", (adapter.stored[name],)
            last = mlx and name.endswith("patch_embed.proj.weight")
            tensor = Tensor(name, tensor.shape, parts, folded=mlx and is_zero_centred(name), channels_last=last)
        yield name, replace(tensor, adapter=adapter)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_rows(part: Entry, start: int, stop: int, files: Mapping[Path, int]) -> np.ndarray:
    """Rows start <= row < stop of a stored tensor as unsigned integers of its width: (rows, the other axes as one).

    files: descriptors of the source's files.
    """
    row = part.nbytes // part.shape[0]
    with reading(part.file):
        data = read_bytes(part, files[part.file], start * row, (stop - start) * row)
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


def dequantize(parts: list[np.ndarray], dtypes: list[str], quantization: Quantization) -> np.ndarray:
    """(rows, columns) float32: the values of quantized rows, in float32 arithmetic on what is stored."""
    weight, scales, *biases = (
        mx.array(part if dtype in ("U8", "U32") else as_float32(part, dtype))
        for part, dtype in zip(parts, dtypes, strict=True)
    )
    q = quantization
    values = mx.dequantize(
        weight, scales, biases[0] if biases else None, q.group_size, q.bits, q.mode, dtype=mx.float32, stream=mx.cpu
    )
    return np.asarray(values)


def read_values(tensor: Tensor, start: int, stop: int, files: Mapping[Path, int]) -> np.ndarray:
    """Rows of a tensor as bits of tensor.dtype, in Hugging Face's layout: (rows, the other axes as one)."""
    if tensor.adapter and tensor.is_fused:
        values = as_float32(read_values(tensor.stored, start, stop, files), tensor.stored.dtype)
        return fused_rows(tensor.adapter, tensor.name, values, start).view(np.uint32)
    if tensor.block:
        codes, scales = tensor.parts
        high, _ = tensor.block
        factors = as_float32(read_rows(scales, start // high, -(-stop // high), files), scales.dtype)
        return decode(read_rows(codes, start, stop, files), factors, tensor.block, start).view(np.uint32)
    parts = [read_rows(part, start, stop, files) for part in tensor.parts]
    if tensor.quantization:
        return dequantize(parts, [part.dtype for part in tensor.parts], tensor.quantization).view(np.uint32)
    bits, dtype = parts[0], tensor.parts[0].dtype
    if dtype == "F64":
        bits, dtype = as_float32(bits, dtype).view(np.uint32), "F32"
    if tensor.channels_last:
        channels = tensor.shape[1]
        bits = np.ascontiguousarray(bits.reshape(len(bits), -1, channels).swapaxes(1, 2)).reshape(len(bits), -1)
    if tensor.folded:
        return (as_float32(bits, dtype) - np.float32(1)).view(np.uint32)
    return bits
