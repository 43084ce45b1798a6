"""The safetensors format: eight bytes of length, a JSON header, and the numbers, without gaps and overlaps.

A header is used only after every rule of the format was checked.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import without_duplicates

HEADER_BYTES = 100_000_000  # the format's limit
PIECE = 1 << 22  # numbers read at a time
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_WORD = 2**64  # sizes and offsets are 64-bit words

DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
DTYPE_BYTES = {name: bits // 8 for name, bits in DTYPE_BITS.items() if bits % 8 == 0}
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights that are not packed may be stored in

# A file that holds any of these cannot be opened by mx.load, whichever of its tensors are wanted.
_NOT_MLX = {"F64", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"}
_ARRAYS = {
    "BF16": (np.uint16, mx.bfloat16), "F16": (np.uint16, mx.float16), "F32": (np.uint32, mx.float32),
    "F64": (np.float64, mx.float32), "U32": (np.uint32, mx.uint32), "U8": (np.uint8, mx.uint8),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its byte range, and its name, dtype and shape by the header."""

    file: Path
    stored_name: str
    dtype: str  # safetensors' name: BF16, F32, U32 ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    nbytes: int
    lazy: bool = True  # whether mx.load can open the file

    partial: ClassVar[bool] = False  # whether it is a part of a tensor, see cut.py

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the tensor, PIECE numbers at a time."""
        step = PIECE * DTYPE_BYTES[self.dtype]
        with self.file.open("rb") as stream:
            for start in range(0, self.nbytes, step):
                yield read_bytes(self, stream.fileno(), start, min(step, self.nbytes - start))


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    entries: dict[str, Entry]  # by stored name
    metadata: dict[str, str]


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file by stored name. InputError when it is truncated or breaks the format."""
    return open_header(file).entries


def open_header(file: Path) -> Header:
    """The tensors and the metadata of one safetensors file. InputError as for read_header."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0] if size >= 8 else 0
            if not 0 < length <= size - 8:
                why = f"is truncated or not a safetensors file ({size} bytes); download it again"
                raise InputError("safetensors_truncated", f"{file} {why}")
            header = stream.read(length) if length <= HEADER_BYTES else b""
    except OSError as error:
        raise InputError("file_unreadable", f"{file} cannot be read ({error.strerror}); mend that first") from error
    try:
        if length > HEADER_BYTES:
            raise ValueError(f"it has {length} bytes and the format allows {HEADER_BYTES}")
        tensors, metadata = _parse(header)
        end = _contiguous(tensors)
    except (ValueError, RecursionError) as error:
        raise InputError("safetensors_invalid", f"the header of {file} is damaged: {error}; get it again") from error
    data = 8 + length
    if data + end != size:
        told = f"{file} must have {data + end} bytes by its header, it has {size}"
        if data + end > size:
            raise InputError("safetensors_truncated", f"{told}: truncated; download it again")
        raise InputError("safetensors_too_long", f"{told}: bytes follow its tensors; download it again")
    lazy = not any(tensor["dtype"] in _NOT_MLX for tensor in tensors.values())
    entries = {
        name: Entry(file, name, tensor["dtype"], tuple(tensor["shape"]), data + begin, end - begin, lazy)
        for name, tensor in tensors.items()
        for begin, end in [tensor["data_offsets"]]
    }
    return Header(entries, metadata)


def _parse(header: bytes) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Name -> dtype, shape and data_offsets, each of the right type and in agreement, and the metadata; otherwise
    ValueError.
    """
    if header[:1] != b"{":
        raise ValueError("it does not begin with a brace")
    values = json.loads(header.decode("utf-8"), object_pairs_hook=without_duplicates)
    metadata = values.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("__metadata__ is not of strings")
    for name, value in values.items():
        name.encode("utf-8")  # half of a surrogate pair is no text
        if fault := _fault(value):
            raise ValueError(f"{name[:200]!r}: {fault}")
    return values, metadata or {}


def _fault(value: Any) -> str | None:
    """The rule that the description of one tensor breaks; None for none."""
    if not isinstance(value, dict) or set(value) != _ENTRY_KEYS:
        return f"not described by {', '.join(sorted(_ENTRY_KEYS))}"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"dtype {str(dtype)[:50]!r} is not of the format"
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        return "shape and data_offsets must be whole numbers, not below 0"
    bits, (begin, end) = DTYPE_BITS[dtype], offsets
    for size in shape:
        bits *= size
        if bits >= _WORD:  # also where a later size is 0, and before the product grows beyond measure
            return "more numbers than a file can hold"
    return None if bits == 8 * (end - begin) else f"{end - begin} bytes for {dtype} {shape[:8]}"


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _WORD for value in values)


def _contiguous(tensors: Mapping[str, Mapping[str, Any]]) -> int:
    """The end of the last tensor, in bytes from the first. ValueError for gaps and overlaps."""
    position = 0
    for (begin, end), name in sorted((tensor["data_offsets"], name) for name, tensor in tensors.items()):
        if begin != position:
            kind = "overlaps another" if begin < position else "has a gap before it"
            raise ValueError(f"{name[:200]!r} {kind}: it begins at {begin}, and the one before it ends at {position}")
        position = end
    return position


# --- numbers ---------------------------------------------------------------------------------------------------------


def open_arrays(entries: Mapping[str, Entry]) -> dict[str, mx.array]:
    """Lazy arrays of these tensors, in the dtype of the file; float64 becomes float32.

    Parts of tensors, and tensors of a file that MLX cannot open, are read at once.
    """
    files: dict[Path, Mapping[str, mx.array]] = {}
    arrays = {}
    for name, entry in entries.items():
        if entry.partial or not entry.lazy:
            arrays[name] = _read(entry)
            continue
        if entry.file not in files:
            loaded = mx.load(str(entry.file))
            assert isinstance(loaded, dict)
            files[entry.file] = loaded
        arrays[name] = files[entry.file][entry.stored_name]
    return arrays


def as_array(data: bytes | bytearray, dtype: str) -> mx.array:
    """The flat array of these bytes of a tensor of this dtype; float64 as float32."""
    return mx.view(mx.array(_numbers(data, dtype)), _ARRAYS[dtype][1])


def _numbers(data: bytes | bytearray, dtype: str) -> np.ndarray:
    """The bits as unsigned integers, for numpy has no bfloat16; float64 as float32."""
    numbers = np.frombuffer(data, _ARRAYS[dtype][0])
    if dtype != "F64":
        return numbers
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
        return numbers.astype(np.float32)


def _read(entry: Entry) -> mx.array:
    """All of it, read piece by piece."""
    numbers = np.empty(math.prod(entry.shape), _ARRAYS[entry.dtype][0] if entry.dtype != "F64" else np.float32)
    filled = 0
    for data in entry.pieces():
        piece = _numbers(data, entry.dtype)
        numbers[filled : filled + len(piece)], filled = piece, filled + len(piece)
    return mx.view(mx.array(numbers), _ARRAYS[entry.dtype][1]).reshape(entry.shape)


def read_bytes(entry: Entry, file: int, start: int, nbytes: int) -> bytes:
    """Bytes of a tensor from its byte `start` on. file: a descriptor. InputError where the file ends before."""
    assert not entry.partial, "bytes of a part do not lie side by side"
    data = os.pread(file, nbytes, entry.start + start)
    if len(data) != nbytes:
        where = f"{entry.file} ended in the middle of {entry.stored_name}"
        raise InputError("source_changed", f"{where}: it changed while it was read")
    return data


def same_numbers(a: Entry, b: Entry) -> bool:
    """Whether two tensors have the same shape and numbers, compared piece by piece."""
    if a.shape != b.shape or not {a.dtype, b.dtype} <= set(_ARRAYS):
        return False
    return all(
        mx.array_equal(as_array(own, a.dtype), as_array(other, b.dtype)).item()
        for own, other in zip(a.pieces(), b.pieces(), strict=True)
    )
