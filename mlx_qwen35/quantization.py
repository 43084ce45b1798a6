"""The ways in which MLX packs a matrix."""

from dataclasses import dataclass

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

# Bits and group sizes that MLX offers for each quantization mode, and the dtypes of the packed parts.
MODES = {
    "affine": {"bits": (2, 3, 4, 5, 6, 8), "group_size": (32, 64, 128)},
    "mxfp4": {"bits": (4,), "group_size": (32,)},
    "mxfp8": {"bits": (8,), "group_size": (32,)},
    "nvfp4": {"bits": (4,), "group_size": (16,)},
}


@dataclass(frozen=True)
class Quantization:
    """How one matrix is packed."""

    group_size: int
    bits: int
    mode: str

    def __post_init__(self) -> None:
        offered = MODES.get(self.mode) if isinstance(self.mode, str) else None
        if offered is None:
            raise InputError(
                "quantization_invalid", f"quantization mode must be one of {', '.join(MODES)}, got {shown(self.mode)}"
            )
        for name in ("bits", "group_size"):
            value = getattr(self, name)
            if type(value) is not int or value not in offered[name]:
                raise InputError(
                    "quantization_invalid", f"mode {self.mode!r} offers {name} {offered[name]}, got {shown(value)}"
                )

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return ("BF16", "F16", "F32") if self.mode == "affine" else ("U8",)

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the tensors that stand for a weight of (rows, columns)."""
        rows, columns = shape
        groups = (rows, columns // self.group_size)
        packed = {"weight": (rows, columns * self.bits // 32), "scales": groups}
        return packed | {"biases": groups} if self.mode == "affine" else packed
