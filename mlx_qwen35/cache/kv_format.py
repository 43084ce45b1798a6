"""How the keys and values of a cache are stored: in the activation dtype, or quantized column by column."""

from dataclasses import dataclass
from typing import Any

from mlx_qwen35.values import choice

FORMS = ("8", "8/4", "4")  # bits of keys and values, or of keys / of values


@dataclass(frozen=True)
class KVFormat:
    """Bits of a key's and of a value's elements; 16 stands for the activation dtype, whatever its size.

    rotate: whether a Hadamard transform spreads each head over its elements before it is quantized.
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

    @property
    def quantized(self) -> bool:
        return self.key_bits < 16

    @property
    def name(self) -> str:
        """As in FORMS, with "rotated" behind it; "16" for the activation dtype."""
        bits = str(self.key_bits) if self.key_bits == self.value_bits else f"{self.key_bits}/{self.value_bits}"
        return f"{bits} rotated" if self.rotate else bits


def check_kv_bits(name: str, value: Any) -> str:
    """One of FORMS; a whole number is its text."""
    return choice(name, str(value) if isinstance(value, int) else value, FORMS)
