"""Recipes: how each kind of tensor is stored, and why. A recipe is named, read from a file, or made of options."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mlx_qwen35.checkpoint.dtypes import DTYPES, check_dtype
from mlx_qwen35.checkpoint.folder import is_file
from mlx_qwen35.checkpoint.names import MTP, VISION
from mlx_qwen35.checkpoint.rope_fields import check_rope_scaling
from mlx_qwen35.checkpoint.shapes import is_matrix
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import read_json
from mlx_qwen35.options import option, settle_switches
from mlx_qwen35.quantization import MODES, Quantization

# Ends of the names of weights: the projections back into the residual stream, behind a gate, and the two small
# projections that make the DeltaNet's decay and write strength.
OUT = ("linear_attn.out_proj.weight", "self_attn.o_proj.weight")
GATES = ("linear_attn.in_proj_a.weight", "linear_attn.in_proj_b.weight")

_OUT_IN_8 = (
    "out_proj and o_proj in 8 bit: of all tensors packing harms out_proj most, and what enters both comes from behind "
    "a gate, so that no scale can be moved out of it"
)
_GATES_PLAIN = (
    "in_proj_a and in_proj_b unquantized: 8 MB that decide how long every state is kept; in 4 bit they cost nano 3 % "
    "more KL divergence, and would save the 4B 24 of 322 launches a token"
)
_VISION_BITS = (0, *MODES["affine"]["bits"])
_VISION_GROUPS = (64, 32)  # the first that divides a matrix's width is taken


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is stored: text model by `bulk` and its exceptions, MTP head by `bulk`, vision encoder affine.

    bulk: None leaves everything unquantized. exceptions: end of a weight's name -> its quantization, None for
    unquantized. vision_bits: 0 leaves the vision encoder unquantized. dtype: of unquantized tensors; None is the
    source's. reasons: sentences for the model card.
    """

    use: str
    bulk: Quantization | None
    exceptions: Mapping[str, Quantization | None] = field(default_factory=dict)
    vision_bits: int = 8
    dtype: str | None = None
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.vision_bits not in _VISION_BITS:
            known = ", ".join(map(str, _VISION_BITS))
            raise InputError("option_invalid", f"--q-vision-bits must be one of {known}, got {self.vision_bits}")

    def quantization(self, name: str, shape: tuple[int, ...]) -> Quantization | None:
        """The quantization of the tensor of this Hugging Face name; None leaves it unquantized.

        A matrix of text model or MTP head whose width is no multiple of the group size is for the caller to refuse.
        """
        if self.bulk is None or not is_matrix(name, shape):
            return None
        if name.startswith(VISION):
            group_size = next((size for size in _VISION_GROUPS if shape[1] % size == 0), None)
            return Quantization(group_size, self.vision_bits, "affine") if self.vision_bits and group_size else None
        exceptions = {} if name.startswith(MTP) else self.exceptions
        return next((chosen for end, chosen in exceptions.items() if name.endswith(end)), self.bulk)


def _affine(bits: int) -> Quantization:
    return Quantization(64, bits, "affine")


def _mixed(use: str, bulk: Quantization, *reasons: str) -> Recipe:
    exceptions = dict.fromkeys(OUT, _affine(8)) | dict.fromkeys(GATES)
    return Recipe(use, bulk, exceptions, reasons=(*reasons, _OUT_IN_8, _GATES_PLAIN))


DEFAULT = "4bit"
ROUNDINGS = ("search", "nearest")
RECIPES = {
    "bf16": Recipe("as published", None, dtype="bfloat16", reasons=("nothing is lost",)),
    "fp16": Recipe(
        "as published, for M1 and M2", None, dtype="float16",
        reasons=("M1 and M2 compute in float16 and not in bfloat16",),
    ),
    "8bit": Recipe("near the original, in half the memory", _affine(8), reasons=(
        "8 bit throughout: the error is a fraction of bfloat16's own, and no exception is worth a launch",
    )),
    "6bit": _mixed("hardly any loss, for 16 GB", _affine(6)),
    "5bit": _mixed("little loss", _affine(5)),
    "4bit": _mixed("the default: about 3 GB in all, for 8 GB Macs", _affine(4), "4 bit in groups of 64 in bulk"),
    "mxfp4": _mixed(
        "4.25 bits, scales that are powers of two", Quantization(32, 4, "mxfp4"),
        "MXFP4 in bulk: the smallest; its scales of one byte cost accuracy",
    ),
    "nvfp4": _mixed(
        "4.5 bits, small groups", Quantization(16, 4, "nvfp4"),
        "NVFP4 in bulk: groups of 16 with scales of 8 bits",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class StorageOptions:
    """How weights are stored."""

    recipe: str | None = option(
        help="; ".join(f"{name}: {recipe.use}" for name, recipe in RECIPES.items())
        + f"; or a file that --save-recipe has written (default: {DEFAULT}, but a source that an MLX program has "
        "quantized stays as it is)", metavar="NAME",
    )  # fmt: skip
    quantize: bool = option(False, help="quantize everything alike, without a recipe", aliases=("q",))
    q_bits: int | None = option(help="bits per weight (affine: 2, 3, 4, 5, 6 or 8; default: 4)", least=0, metavar="N")
    q_group_size: int | None = option(
        help="weights per scale (affine: 32, 64 or 128; default: 64)", least=0, metavar="N"
    )
    q_mode: str | None = option(help="quantization mode (default: affine)", choices=tuple(MODES))
    q_vision_bits: int | None = option(
        help="bits per weight of the vision encoder, always affine (2, 3, 4, 5, 6 or 8; default: 8; 0: unquantized); a "
        "matrix whose width is no multiple of 32 stays unquantized", least=0, metavar="N",
    )  # fmt: skip
    dtype: str | None = option(
        help="dtype of what is not quantized (default: the source's)", choices=tuple(DTYPES), check=check_dtype
    )
    rope_scaling: str | None = option(
        help="write yarn or yarn:FACTOR into config.json, for contexts beyond that of training, or none (default: as "
        "in the source)", metavar="TYPE", check=check_rope_scaling,
    )  # fmt: skip
    rounding: str = option("search", help="how quantized groups are rounded (default: search)", choices=ROUNDINGS)

    def __post_init__(self) -> None:
        settle_switches(self)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", check_dtype("--dtype", self.dtype))
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", check_rope_scaling("--rope-scaling", self.rope_scaling))


NO_OPTIONS = StorageOptions()


def choose_recipe(options: StorageOptions) -> Recipe | None:
    """The recipe that the options name or make by hand; None where the source stays quantized as it is.

    InputError for options that contradict each other or have no effect.
    """
    by_hand = {"bits": options.q_bits, "group_size": options.q_group_size, "mode": options.q_mode}
    by_hand = {name: value for name, value in by_hand.items() if value is not None}
    given = [f"--q-{name.replace('_', '-')} {value}" for name, value in by_hand.items()]
    bits = options.q_vision_bits
    if options.recipe is not None:
        return _named(options, bits, ["--quantize"] * bool(options.quantize) + given)
    given += [] if bits is None else [f"--q-vision-bits {bits}"]
    if options.quantize:
        mode = options.q_mode or "affine"
        only = {} if mode == "affine" else {name: sizes[0] for name, sizes in MODES.get(mode, {}).items()}
        bulk = Quantization(**asdict(_affine(4)) | only | by_hand)  # mlx-lm's defaults
        return Recipe("by hand", bulk, vision_bits=8 if bits is None else bits, dtype=options.dtype)
    if given:
        names = ", ".join(given)
        raise InputError("option_no_effect", f"{names} has no effect without --quantize; add -q or leave it out")
    return None


def _named(options: StorageOptions, vision_bits: int | None, given: list[str]) -> Recipe:
    name, dtype = options.recipe, options.dtype
    assert name is not None
    recipe = find_recipe(name)
    if given:
        names = ", ".join(given)
        raise InputError("option_conflict", f"--recipe {name} stands alone, without {names}. Choose one")
    if recipe.bulk is not None:
        return replace(recipe, dtype=dtype, vision_bits=recipe.vision_bits if vision_bits is None else vision_bits)
    if vision_bits is not None:
        raise InputError("option_no_effect", f"--recipe {name} quantizes nothing: leave --q-vision-bits out")
    if dtype not in (None, recipe.dtype):
        raise InputError("option_conflict", f"--recipe {name} stores {recipe.dtype}, not --dtype {dtype}. Choose one")
    return recipe


# --- files -----------------------------------------------------------------------------------------------------------


def names_file(recipe: str | None) -> bool:
    """Whether --recipe names a file and not one of RECIPES."""
    return recipe is not None and recipe not in RECIPES and recipe.endswith(".json")


def _read(values: Mapping[str, Any]) -> Quantization:
    """An entry of a recipe file; what else it says is for people."""
    sizes = values["group_size"], values["bits"]
    if not all(type(size) is int for size in sizes):
        raise TypeError(f"group_size and bits must be whole numbers, got {sizes}")
    return Quantization(*sizes, values["mode"])


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, or in this file. InputError when there is none, or the file is no recipe."""
    if name in RECIPES:
        return RECIPES[name]
    file = Path(os.path.expanduser(name))
    if not names_file(name) or not is_file(file):
        known = ", ".join(RECIPES)
        raise InputError("recipe_not_found", f"--recipe must be one of {known}, or a file *.json; there is no {name}")
    try:
        values = read_json(file)
        chosen = {end: None if of is None else _read(of) for end, of in values["exceptions"].items()}
        reasons = values.get("reasons", [])
        if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
            raise TypeError("'reasons' must be a list of texts")
        return Recipe("from a file", _read(values["bulk"]), chosen, reasons=tuple(reasons))
    except (KeyError, TypeError, AttributeError, OSError, InputError) as error:
        raise InputError(
            "recipe_invalid",
            f"{name} must hold 'bulk' and 'exceptions' as --save-recipe writes them ({type(error).__name__}: {error})",
        ) from error


def save_recipe(file: Path, matrices: Mapping[str, Quantization | None], bulk: Quantization, reason: str) -> None:
    """Write a recipe for matrices of these Hugging Face names; all others are quantized like `bulk`."""
    exceptions = {name: chosen and asdict(chosen) for name, chosen in matrices.items() if chosen != bulk}
    values: dict[str, Any] = {"bulk": asdict(bulk), "exceptions": exceptions, "reasons": [reason]}
    text = json.dumps(values, indent=2) + "\n"
    with _saving():
        if file.exists() and not file.is_file():  # a terminal, a pipe
            file.write_text(text, encoding="utf-8")
            return
        grown = file.with_name(f".recipe.{os.getpid()}")
        try:
            grown.write_text(text, encoding="utf-8")
            os.replace(grown, file)
        finally:
            grown.unlink(missing_ok=True)


def check_saving(file: Path, reads: Iterable[Path]) -> None:
    """InputError unless save_recipe can write this file, and none of the files read is the same."""
    with _saving():
        with suppress(FileNotFoundError):
            file.lstat()
        if file.exists() and (same := [path for path in reads if path.exists() and path.samefile(file)]):
            raise InputError("target_overlaps_source", f"--save-recipe must not write over {same[0]}, which is read")
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder")
        with TemporaryFile(dir=file.parent):
            pass


@contextmanager
def _saving() -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError("output_unwritable", f"--save-recipe must name a file that can be written: {error}") from error
