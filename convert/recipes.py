"""Recipes, named or from a file: how each kind of tensor is stored, and why."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint import Quantization
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import read_json

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


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, or in this file. InputError when there is none, or the file is no recipe."""
    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(".json"):
        raise InputError(
            "recipe_not_found",
            f"--recipe must be one of {', '.join(RECIPES)}, or a file that ends in .json; got {name!r}",
        )
    file = Path(name).expanduser()
    if not file.is_file():
        raise InputError("recipe_not_found", f"--recipe must name a file that is there; there is no {name}")
    values = read_json(file)
    try:
        bulk, exceptions = _form(values["bulk"]), {end: how and _form(how) for end, how in values["exceptions"].items()}
        return Recipe("from a file", bulk, exceptions, reasons=tuple(map(str, values.get("reasons", ()))))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "recipe_invalid",
            f"{name} must hold 'bulk' and 'exceptions' as --save-recipe writes them ({type(error).__name__}: {error})",
        ) from error


def save_recipe(file: Path, matrices: Mapping[str, Quantization | None], bulk: Quantization, reason: str) -> None:
    """Write a recipe that packs these matrices so, by Hugging Face name, and others like `bulk`."""
    exceptions = {name: how and asdict(how) for name, how in matrices.items() if how != bulk}
    values: dict[str, Any] = {"bulk": asdict(bulk), "exceptions": exceptions, "reasons": [reason]}
    try:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError("output_unwritable", f"--save-recipe must name a file that can be written: {error}") from error


def _form(values: Mapping[str, Any]) -> Quantization:
    return Quantization(values["group_size"], values["bits"], values["mode"])
