"""The draft head as other programs leave it: in a file beside the trunk, packed in its own way, norms in either form.

MLX programs add the one to a trunk's norms (gamma - 1 becomes gamma). To those of a head some do and some do not, and
most do not say which. A wrong guess costs accepted drafts and never changes a text, for every draft is verified.

Nobody needs such a file: a folder that is whole without it opens without it, and keeps the reason (mtp_head_fault).
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.folder import check_file, inside, is_file
from mlx_qwen35.checkpoint.names import MTP, mtp_name
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import Fields, read_json
from mlx_qwen35.quantization import Quantization

PLACES = ("mtp.safetensors", "mtp/weights.safetensors", "model-mtp.safetensors", "optiq/mtp.safetensors")
FORM = ("group_size", "bits", "mode")
_SHARED = ("embed_tokens", "lm_head")

# What config.json may say of a head alone. Of the words for how its norms are stored, these mean gamma - 1.
_FILES, _FILE = "mlx_lm_extra_tensors", "mtp_file"
_PACKING = "mtplx_mtp_quantization"
_ENCODINGS = ("mtplx_mtp_norm_encoding", "mtp_norm_encoding")
_RAW = ("delta", "delta_plus_one", "mlx_delta")

# The norms that tell. Those of single heads have too few numbers, and mtp.norm too often such as fit both forms.
_TELLING = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "pre_fc_norm_embedding.weight",
    "pre_fc_norm_hidden.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """What config.json says of the draft head alone.

    file: where it lies, within the folder. raw: whether its norms are gamma - 1. None where nothing is said. packing:
    group_size, bits and mode of its matrices, those that are given; overrides: the same by Hugging Face module and dot.
    """

    file: str | None = None
    raw: bool | None = None
    packing: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def declared(folder: Path) -> Declared:
    """Read it. InputError when an entry is not of the kind that it has in every program."""
    top = Fields(read_json(folder / "config.json"), "config.json")
    files, packing = (Fields(top.object(name) or {}, f"config.json: {name}") for name in (_FILES, _PACKING))
    places = [(top, name) for name in _ENCODINGS]
    places += [(packing, name) for name in ("norm_encoding", "norm_weight_encoding")]
    words = [fields.get(name, str).strip().lower() for fields, name in places if fields.has(name)]
    modules = {name: value for name, value in packing.values.items() if isinstance(value, dict)}
    modules |= modules.pop("modules", {})
    return Declared(
        file=files.get(_FILE, str) if files.has(_FILE) else None,
        raw=any(word in _RAW for word in words) if words else None,
        packing=form(packing.values),
        overrides={mtp_name(f"{name}."): form(value) for name, value in modules.items() if isinstance(value, dict)},
    )


def form(values: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry of config.json says of group_size, bits and mode."""
    return {name: values[name] for name in FORM if values.get(name) is not None}


def is_shared(name: str) -> bool:
    """Whether the tensor of this name, in a head's own file, repeats the trunk's embedding or logits matrix.

    A head reads those of the trunk, for mtp_use_dedicated_embeddings is false.
    """
    return any(part in _SHARED for part in name.split("."))


def find(folder: Path, named: str | None) -> Path | None:
    """The file of a head that the trunk's files do not hold: the one that config.json names, or the first of PLACES.

    InputError when config.json names one that is absent or outside of the folder.
    """
    if named is None:
        there = next((folder / place for place in PLACES if os.path.lexists(folder / place)), None)
        if there:
            check_file(there)
        return there
    file = inside(folder, str(named), f"config.json ({_FILES}.{_FILE})")
    if not is_file(file):
        raise InputError(
            "draft_head_missing",
            f"config.json says that the draft head is in {named!r} ({_FILES}.{_FILE}), which is absent. "
            "Download it, or take the entry out to go without drafts",
        )
    return file


# --- the norms' form -------------------------------------------------------------------------------------------------


def tells(name: str) -> bool:
    """Whether the tensor of this Hugging Face name is one to decide by in which form a head's norms are stored."""
    return name.startswith(MTP) and name.endswith(_TELLING)


def norms_are_raw(norms: Mapping[str, mx.array], said: bool | None) -> bool:
    """Whether a head's norms are gamma - 1 where an MLX program made the trunk's gamma.

    norms: those that tell, by name, as stored. said: by config.json, which decides; where it says nothing, gamma - 1
    if one norm can be nothing else. InputError when config.json says what one of them cannot be.
    """
    found = {name: _is_raw(norm) for name, norm in norms.items()}
    if said is None:
        return True in found.values()
    if against := [name for name, raw in found.items() if raw is (not said)]:
        forms = ("gamma - 1", "gamma")
        raise InputError(
            "draft_head_contradicted",
            f"config.json says that the draft head's norms are stored as {forms[not said]}; {against[0]} holds numbers "
            f"that only {forms[said]} has. Take {' or '.join(_ENCODINGS)}, or its like in {_PACKING}, out of it",
        )
    return said


def _is_raw(norm: mx.array) -> bool | None:
    """Whether a norm is gamma - 1 as it was trained, in bfloat16; None where its numbers allow both forms, or neither.

    The numbers of gamma - 1 are bfloat16. Those of gamma are one more, rounded to the dtype that they are stored in: to
    take the one off, round to bfloat16 and add it again gives the very numbers back (up to 65; the tests try them all).
    """
    values = norm.astype(mx.float32)
    less = (values - 1.0).astype(mx.bfloat16).astype(mx.float32)
    gamma = bool(mx.array_equal(1.0 + less, values))
    raw = bool(mx.array_equal(values.astype(mx.bfloat16).astype(mx.float32), values))
    return None if raw == gamma else raw


# --- for the converter -----------------------------------------------------------------------------------------------


def settled(values: Mapping[str, Any], packed: Mapping[str, Quantization]) -> dict[str, Any]:
    """The values of config.json without what they say of the head alone; its packing goes where the trunk's is.

    packed: Hugging Face name of a weight of the head -> how it is packed.
    """
    own = {name: value for name, value in values.items() if name not in (_FILES, _PACKING, *_ENCODINGS)}
    files = values.get(_FILES)
    if isinstance(files, dict) and (others := {name: value for name, value in files.items() if name != _FILE}):
        own[_FILES] = others
    if packed and values.get(_PACKING):
        first, *_ = packed.values()
        modules = {f"language_model.{name.removesuffix('.weight')}": asdict(how) for name, how in packed.items()}
        for name in {"quantization"} | {"quantization_config"} & set(own):
            own[name] = (own.get(name) or asdict(first)) | modules
    return own
