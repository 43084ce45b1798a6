"""How the keys and values of a cache are stored: in the activation dtype, or quantized column by column."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_qwen35.kernels.attention import attention
from mlx_qwen35.kernels.packed_attention import GROUP, Packed, pack, packed_attention
from mlx_qwen35.values import choice

FORMS = ("8", "8/4", "4")  # bits of keys and values, or of keys / of values


class Columns(NamedTuple):
    """The first `length` columns of arrays (B, Hk, capacity, ...) by name. Whole, since a kernel copies a slice."""

    arrays: Mapping[str, mx.array]
    length: int


@dataclass(frozen=True)
class KVFormat:
    """Bits of a key's and of a value's elements; 16 stands for the activation dtype, whatever its size.

    rotate: whether a Hadamard transform spreads each head over its elements before it is quantized.

    A quantized column has arrays keys.words, keys.scales, keys.biases, and the same of values; with `rotate` they are
    called rotated_keys.words and so on. So the arrays of a cache tell their format.
    """

    key_bits: int = 16
    value_bits: int = 16
    rotate: bool = False

    @classmethod
    def of(cls, bits: str | None, rotate: bool = False) -> "KVFormat":
        """The format of one of FORMS; None: not quantized."""
        if bits is None:
            return cls()
        keys, _, values = bits.partition("/")
        return cls(int(keys), int(values or keys), rotate)

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, mx.array]) -> "KVFormat":
        """The format of columns that have these names."""
        if "keys" in arrays:
            return cls()
        rotate = "rotated_keys.words" in arrays
        key_bits, value_bits = (
            32 * arrays[f"{name}.words"].shape[-1] // (GROUP * arrays[f"{name}.scales"].shape[-1])
            for name in _names(rotate)
        )
        return cls(key_bits, value_bits, rotate)

    @property
    def quantized(self) -> bool:
        return self.key_bits < 16

    @property
    def name(self) -> str:
        """As in FORMS, with "rotated" behind it; "16" for the activation dtype."""
        bits = str(self.key_bits) if self.key_bits == self.value_bits else f"{self.key_bits}/{self.value_bits}"
        return f"{bits} rotated" if self.rotate else bits

    def fits(self, dim: int) -> bool:
        """Whether heads of `dim` elements can be stored: whole groups if quantized, a power of two if rotated."""
        return not self.quantized or (dim % GROUP == 0 and not (self.rotate and dim & (dim - 1)))

    def smaller(self, dim: int) -> list[str]:
        """Those of FORMS with fewer bits that heads of `dim` elements fit into."""
        found = {form: KVFormat.of(form, self.rotate) for form in FORMS}
        bits = self.key_bits + self.value_bits
        return [form for form, kv in found.items() if kv.key_bits + kv.value_bits < bits and kv.fits(dim)]

    # --- columns ---

    def encode(self, keys: mx.array, values: mx.array) -> dict[str, mx.array]:
        """Keys and values (B, Hk, T, D) -> arrays (B, Hk, T, ...) by name, each column of its own key and value."""
        if not self.quantized:
            return {"keys": keys, "values": values}
        if self.rotate:
            keys, values = mx.hadamard_transform(keys), mx.hadamard_transform(values)
        packed = pack(keys, self.key_bits), pack(values, self.value_bits)
        return {
            f"{name}.{part}": getattr(own, part)
            for name, own in zip(_names(self.rotate), packed, strict=True)
            for part in ("words", "scales", "biases")
        }

    def attend(self, q: mx.array, columns: Columns, scale: float, causal: bool) -> mx.array:
        """`attention` over columns that `encode` made: q (B, H, T, D) -> (B, H, T, D).

        The Hadamard transform is orthogonal and its own inverse. So rotated queries and keys have the same products,
        and the output over rotated values is rotated back.
        """
        arrays, length = columns
        if not self.quantized:
            return attention(q, arrays["keys"][:, :, :length], arrays["values"][:, :, :length], scale, causal)
        if self.rotate:
            q = mx.hadamard_transform(q)
        keys, values = (
            Packed(arrays[f"{name}.words"], arrays[f"{name}.scales"], arrays[f"{name}.biases"], bits)
            for name, bits in zip(_names(self.rotate), (self.key_bits, self.value_bits), strict=True)
        )
        out = packed_attention(q, keys, values, scale, causal, length)
        return mx.hadamard_transform(out) if self.rotate else out

    # --- bytes ---

    def nbytes(self, dim: int, itemsize: int) -> int:
        """Bytes of a key and a value of `dim` elements. itemsize: of the activation dtype."""
        return sum(_bytes(dim, bits, itemsize) for bits in (self.key_bits, self.value_bits))

    def widest(self, dim: int, itemsize: int) -> int:
        """Bytes of a key or value of `dim` elements in the largest of a column's arrays."""
        return dim * self.key_bits // 8 if self.quantized else dim * itemsize


def _names(rotate: bool) -> tuple[str, str]:
    return ("rotated_keys", "rotated_values") if rotate else ("keys", "values")


def _bytes(dim: int, bits: int, itemsize: int) -> int:
    """Of a key or a value: its elements, and a scale and a bias for each group."""
    return dim * itemsize if bits == 16 else dim * bits // 8 + 2 * itemsize * dim // GROUP


UNQUANTIZED = KVFormat()


def check_kv_bits(name: str, value: Any) -> str:
    """One of FORMS; a whole number is its text."""
    return choice(name, str(value) if isinstance(value, int) else value, FORMS)
