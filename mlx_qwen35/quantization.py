"""The formats in which MLX quantizes a matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

# Mode -> the bits and group sizes that MLX offers for it.
MODES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "affine": {"bits": (2, 3, 4, 5, 6, 8), "group_size": (32, 64, 128)},
    "mxfp4": {"bits": (4,), "group_size": (32,)},
    "mxfp8": {"bits": (8,), "group_size": (32,)},
    "nvfp4": {"bits": (4,), "group_size": (16,)},
}


@dataclass(frozen=True)
class Quantization:
    """The quantization of one matrix. InputError for bits, a group size or a mode that MLX does not offer."""

    group_size: int
    bits: int
    mode: str

    def __post_init__(self) -> None:
        offered = MODES.get(self.mode) if isinstance(self.mode, str) else None
        if offered is None:
            modes = ", ".join(MODES)
            raise InputError("quantization_invalid", f"mode must be one of {modes}, got {shown(self.mode)}")
        for name, known in offered.items():
            value = getattr(self, name)
            if type(value) is not int or value not in known:
                raise InputError("quantization_invalid", f"mode {self.mode} offers {name} {known}, got {shown(value)}")

    def __str__(self) -> str:
        return f"{self.bits} bit, groups of {self.group_size}" if self.mode == "affine" else self.mode

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """The dtypes that scales and biases may have, by safetensors' names."""
        return ("BF16", "F16", "F32") if self.mode == "affine" else ("U8",)

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the tensors that hold a quantized matrix of shape (rows, columns)."""
        rows, columns = shape
        groups = (rows, columns // self.group_size)
        parts: dict[str, tuple[int, ...]] = {"weight": (rows, columns * self.bits // 32), "scales": groups}
        return parts | {"biases": groups} if self.mode == "affine" else parts
