"""How each tensor is stored: the options, the rule for a tensor, and what config.json says of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mlx_qwen35.checkpoint.names import MTP, VISION, hugging_face_name
from mlx_qwen35.checkpoint.shapes import is_matrix
from mlx_qwen35.convert.recipes import Recipe, find_recipe
from mlx_qwen35.errors import InputError
from mlx_qwen35.quantization import MODES, Quantization
from mlx_qwen35.values import shown

_AFFINE = {"bits": 4, "group_size": 64}  # mlx-lm's defaults; each other mode offers one choice
_VISION_GROUPS = (64, 32)  # the first that divides a matrix's width is taken


@dataclass(frozen=True)
class Packing:
    """How a checkpoint is packed: text model by `bulk` and its exceptions, draft head by `bulk`, tower affine.

    exceptions: end of a weight's name -> how, None for unquantized. vision_bits 0 leaves the tower unquantized.
    """

    bulk: Quantization
    exceptions: Mapping[str, Quantization | None] = field(default_factory=dict)
    vision_bits: int = 8

    def __post_init__(self) -> None:
        offered = (0, *MODES["affine"]["bits"])
        if self.vision_bits not in offered:
            raise InputError(
                "option_invalid",
                f"--q-vision-bits must be one of {', '.join(map(str, offered))}, got {self.vision_bits}",
            )

    def of(self, name: str, shape: tuple[int, ...]) -> Quantization | None:
        """How the tensor of this Hugging Face name is packed, None when it stays unquantized.

        Matrices of text model and draft head that the group size does not divide are for the caller to refuse.
        """
        if not is_matrix(name, shape):
            return None
        if name.startswith(VISION):
            group_size = next((size for size in _VISION_GROUPS if shape[1] % size == 0), None)
            return Quantization(group_size, self.vision_bits, "affine") if self.vision_bits and group_size else None
        exceptions = {} if name.startswith(MTP) else self.exceptions
        return next((how for end, how in exceptions.items() if name.endswith(end)), self.bulk)


@dataclass(frozen=True)
class Options:
    """What the options for packing come to. packing: None when nothing is packed."""

    recipe: Recipe | None
    packing: Packing | None
    dtype: str | None


def read_options(
    recipe: str | None = None,
    quantize: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    vision_bits: int | None = None,
    dtype: str | None = None,
) -> Options:
    """A recipe, a packing by hand, or nothing packed, with the defaults of what is not given."""
    by_hand = {"--q-bits": bits, "--q-group-size": group_size, "--q-mode": mode}
    given = [f"{option} {value}" for option, value in by_hand.items() if value is not None]
    if recipe is not None:
        return _by_recipe(recipe, (["--quantize"] if quantize else []) + given, vision_bits, dtype)
    if not quantize:
        given += [f"--q-vision-bits {vision_bits}"] if vision_bits is not None else []
        if given:
            raise InputError(
                "option_no_effect", f"{', '.join(given)} has no effect without --quantize; add -q or leave it out"
            )
        return Options(None, None, dtype)
    mode = mode or "affine"
    default = _AFFINE if mode == "affine" else {name: offered[0] for name, offered in MODES.get(mode, {}).items()}
    sizes = {"bits": bits, "group_size": group_size}
    bulk = Quantization(mode=mode, **(_AFFINE | default | {k: v for k, v in sizes.items() if v is not None}))
    return Options(None, Packing(bulk, vision_bits=8 if vision_bits is None else vision_bits), dtype)


def _by_recipe(name: str, given: list[str], vision_bits: int | None, dtype: str | None) -> Options:
    recipe = find_recipe(name)
    if given:
        raise InputError(
            "option_conflict",
            f"--recipe {name} says how everything is packed; {', '.join(given)} must not be given with it. Choose one",
        )
    if recipe.bulk is None:
        if vision_bits is not None:
            raise InputError(
                "option_no_effect",
                f"--q-vision-bits has no effect with --recipe {name}, which packs nothing; leave it out",
            )
        if dtype not in (None, recipe.dtype):
            raise InputError(
                "option_conflict", f"--recipe {name} stores {recipe.dtype}; --dtype {dtype} contradicts it. Choose one"
            )
        return Options(recipe, None, recipe.dtype)
    if vision_bits is not None:
        recipe = replace(recipe, vision_bits=vision_bits)
    return Options(recipe, Packing(recipe.bulk, recipe.exceptions, recipe.vision_bits), dtype)


def config_entry(packing: Packing, packed: Mapping[str, Quantization]) -> dict[str, Any]:
    """The `quantization` of config.json, as mlx-lm and mlx-vlm read it: the bulk's, and that of each other matrix.

    packed: Hugging Face name of a weight -> how it is packed. Modules have the names of those programs.
    """
    others = {
        peer_module(name): asdict(how)
        for name, how in packed.items()
        if how != packing.bulk or name.startswith(VISION)  # mlx-vlm leaves a tower alone that is not named
    }
    return asdict(packing.bulk) | others


def peer_module(name: str) -> str:
    """The module that mlx-lm and mlx-vlm make of a weight of this Hugging Face name."""
    module = hugging_face_name(name).removesuffix(".weight")
    if name.startswith(VISION):
        return "vision_tower." + module.removeprefix(VISION)
    if module.startswith("model.language_model."):
        return "language_model.model." + module.removeprefix("model.language_model.")
    return f"language_model.{module}"


def brief(entry: Any) -> str:
    """What a config.json says of its quantization in an error's length: without lists and what is said of layers."""
    if isinstance(entry, dict):
        entry = {key: value for key, value in entry.items() if not isinstance(value, (dict, list))}
    return shown(entry)
