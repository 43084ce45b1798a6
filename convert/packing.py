"""How each matrix is packed: the options, the rule for a tensor, and what config.json says of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_qwen35.checkpoint import MODES, MTP, VISION, Quantization, is_matrix
from mlx_qwen35.errors import InputError

_AFFINE = {"bits": 4, "group_size": 64}  # mlx-lm's defaults; each other mode offers one choice
_VISION_BITS = 8
_VISION_GROUPS = (64, 32)  # the first that divides a matrix's width is taken


@dataclass(frozen=True)
class Packing:
    """How a checkpoint is packed: the text model's matrices all alike, the vision tower's affine in `vision_bits`.

    vision_bits 0 leaves the tower unquantized.
    """

    text: Quantization
    vision_bits: int

    def __post_init__(self) -> None:
        offered = (0, *MODES["affine"]["bits"])
        if self.vision_bits not in offered:
            raise InputError(f"--q-vision-bits must be one of {', '.join(map(str, offered))}, got {self.vision_bits}")

    def of(self, name: str, shape: tuple[int, ...]) -> Quantization | None:
        """How the tensor of this Hugging Face name is packed, None when it stays unquantized.

        Text matrices that the group size does not divide are for the caller to refuse.
        """
        if not is_matrix(name, shape) or name.startswith(MTP):
            return None
        if not name.startswith(VISION):
            return self.text
        group_size = next((size for size in _VISION_GROUPS if shape[1] % size == 0), None)
        return Quantization(group_size, self.vision_bits, "affine") if self.vision_bits and group_size else None


def read_options(
    quantize: bool, bits: int | None, group_size: int | None, mode: str | None, vision_bits: int | None
) -> Packing | None:
    """The packing that the options ask for, with the defaults of those not given; None when nothing is packed."""
    given = {"--q-bits": bits, "--q-group-size": group_size, "--q-mode": mode, "--q-vision-bits": vision_bits}
    if not quantize:
        if idle := [f"{option} {value}" for option, value in given.items() if value is not None]:
            raise InputError(f"{', '.join(idle)} has no effect without --quantize; add -q or leave it out")
        return None
    mode = mode or "affine"
    default = _AFFINE if mode == "affine" else {name: offered[0] for name, offered in MODES.get(mode, {}).items()}
    given = {"bits": bits, "group_size": group_size}
    text = Quantization(mode=mode, **(_AFFINE | default | {k: v for k, v in given.items() if v is not None}))
    return Packing(text, _VISION_BITS if vision_bits is None else vision_bits)


def config_entry(packing: Packing, packed: Mapping[str, Quantization]) -> dict[str, Any]:
    """The `quantization` of config.json, as mlx-lm and mlx-vlm read it: the text's, and each of the vision tower's.

    packed: Hugging Face name of a weight -> how it is packed. The tower's modules have mlx-vlm's names.
    """
    tower = {
        "vision_tower." + name.removeprefix(VISION).removesuffix(".weight"): asdict(how)
        for name, how in packed.items()
        if name.startswith(VISION)
    }
    return asdict(packing.text) | tower


def brief(entry: Any) -> Any:
    """What a config.json says of its quantization in an error's length: without lists and what is said of layers."""
    if not isinstance(entry, dict):
        return entry
    return {key: value for key, value in entry.items() if not isinstance(value, (dict, list))}
