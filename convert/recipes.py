"""Recipes, named or from a file: how each kind of tensor is stored, and why."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import read_json
from mlx_qwen35.quantization import Quantization

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


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is stored. `reasons` go into the model card."""

    use: str
    bulk: Quantization | None  # of matrices that no exception names; None: unquantized
    exceptions: Mapping[str, Quantization | None] = field(default_factory=dict)  # end of a name -> how
    vision_bits: int = 8
    dtype: str | None = None  # of what is unquantized; None: the source's
    reasons: tuple[str, ...] = ()


def _affine(bits: int, group_size: int = 64) -> Quantization:
    return Quantization(group_size, bits, "affine")


def _mixed(use: str, bulk: Quantization, *reasons: str) -> Recipe:
    exceptions = dict.fromkeys(OUT, _affine(8)) | dict.fromkeys(GATES)
    return Recipe(use, bulk, exceptions, reasons=(*reasons, _OUT_IN_8, _GATES_PLAIN))


DEFAULT = "4bit"
RECIPES = {
    "bf16": Recipe("as published", None, vision_bits=0, dtype="bfloat16", reasons=("nothing is lost",)),
    "fp16": Recipe(
        "as published, for M1 and M2", None, vision_bits=0, dtype="float16",
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


def is_file(name: str | None) -> bool:
    """Whether --recipe names a file and not a recipe of ours."""
    return name is not None and name not in RECIPES and name.endswith(".json")


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, or in this file. InputError when there is none, or the file is no recipe."""
    if name in RECIPES:
        return RECIPES[name]
    if not is_file(name):
        raise InputError(
            "recipe_not_found",
            f"--recipe must be one of {', '.join(RECIPES)}, or a file that ends in .json; got {name!r}",
        )
    try:
        file = Path(name).expanduser()
        there = file.is_file()
    except (OSError, RuntimeError, ValueError):  # an impossible name, nobody's home
        there = False
    if not there:
        raise InputError("recipe_not_found", f"--recipe must name a file that is there; there is no {name}")
    try:
        values = read_json(file)
        exceptions = {end: None if how is None else _form(how) for end, how in values["exceptions"].items()}
        reasons = values.get("reasons", [])
        if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
            raise TypeError("'reasons' must be a list of texts")
        return Recipe("from a file", _form(values["bulk"]), exceptions, reasons=tuple(reasons))
    except (KeyError, TypeError, AttributeError, OSError, InputError) as error:
        raise InputError(
            "recipe_invalid",
            f"{name} must hold 'bulk' and 'exceptions' as --save-recipe writes them ({type(error).__name__}: {error})",
        ) from error


def save_recipe(file: Path, matrices: Mapping[str, Quantization | None], bulk: Quantization, reason: str) -> None:
    """Write a recipe that packs these matrices so, by Hugging Face name, and others like `bulk`."""
    exceptions = {name: how and asdict(how) for name, how in matrices.items() if how != bulk}
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
    """InputError unless save_recipe can write this file, and it is none of those that are read."""
    with _saving():
        with suppress(FileNotFoundError):
            file.lstat()
        if file.exists() and (same := [path for path in reads if path.exists() and path.samefile(file)]):
            raise InputError(
                "target_overlaps_source", f"--save-recipe must not write over what is read; {file} is {same[0]}"
            )
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


def _form(values: Mapping[str, Any]) -> Quantization:
    sizes = values["group_size"], values["bits"]
    if not all(type(size) is int for size in sizes):
        raise TypeError(f"group_size and bits must be whole numbers, got {sizes}")
    return Quantization(*sizes, values["mode"])
