"""The draft head in a file of its own, as other programs write it: with its own quantization, and norms in either form.

MLX programs add the one to the base model's norms (gamma - 1 becomes gamma). Some add it to the norms of the MTP head
too, some do not, and most do not say so. A wrong guess costs accepted drafts and changes no text: drafts are verified.

The file is optional: a folder opens without it too, and Checkpoint.mtp_head_fault holds the reason.
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
_SHARED = ("embed_tokens", "lm_head")

# The fields of config.json for the MTP head alone, and the words for norms stored as gamma - 1.
_FILES, _FILE = "mlx_lm_extra_tensors", "mtp_file"
_QUANTIZATION = "mtplx_mtp_quantization"
_ENCODINGS = ("mtplx_mtp_norm_encoding", "mtp_norm_encoding")
_RAW = ("delta", "delta_plus_one", "mlx_delta")

# The norms whose form can be recognized. q_norm and k_norm have too few numbers, and mtp.norm's often fit both forms.
_TELLING = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "pre_fc_norm_embedding.weight",
    "pre_fc_norm_hidden.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """The fields of config.json for the MTP head alone.

    file: its path in the folder. raw: whether its norms are gamma - 1. Both are None where config.json does not say so.
    quantization: group_size, bits and mode of its matrices, as far as they are given. overrides: the same for single
    modules, by Hugging Face name and dot.
    """

    file: str | None = None
    raw: bool | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def declared(folder: Path) -> Declared:
    """Read the fields. InputError for one of another type than the programs write."""
    top = Fields(read_json(folder / "config.json"), "config.json")
    files, own = (Fields(top.object(name) or {}, f"config.json: {name}") for name in (_FILES, _QUANTIZATION))
    places = [(top, name) for name in _ENCODINGS]
    places += [(own, name) for name in ("norm_encoding", "norm_weight_encoding")]
    words = [fields.get(name, str).strip().lower() for fields, name in places if fields.has(name)]
    modules = {name: value for name, value in own.values.items() if isinstance(value, dict)}
    modules |= modules.pop("modules", {})
    return Declared(
        file=files.get(_FILE, str) if files.has(_FILE) else None,
        raw=any(word in _RAW for word in words) if words else None,
        quantization=settings(own.values),
        overrides={mtp_name(f"{name}."): settings(value) for name, value in modules.items() if isinstance(value, dict)},
    )


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """group_size, bits and mode in an entry of config.json, as far as they are given."""
    return {name: values[name] for name in ("group_size", "bits", "mode") if values.get(name) is not None}


def is_shared(name: str) -> bool:
    """Whether a tensor in the head's file repeats the base model's embedding or lm_head.

    The head uses those of the base model: mtp_use_dedicated_embeddings is false.
    """
    return any(part in _SHARED for part in name.split("."))


def find(folder: Path, named: str | None) -> Path | None:
    """The file of the head: the one that config.json names, else the first of PLACES that is there, else None.

    InputError when config.json names a file that is absent or outside of the folder.
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
    """Whether the tensor of this Hugging Face name is a norm whose form can be recognized."""
    return name.startswith(MTP) and name.endswith(_TELLING)


def norms_are_raw(norms: Mapping[str, mx.array], said: bool | None) -> bool:
    """Whether the head's norms are gamma - 1 in a folder whose base model has gamma.

    norms: the norms that `tells` names, as stored. said: by config.json, which decides; None: gamma - 1 if one norm can
    be nothing else. InputError when config.json contradicts a norm.
    """
    found = {name: _is_raw(norm) for name, norm in norms.items()}
    if said is None:
        return True in found.values()
    if against := [name for name, raw in found.items() if raw is (not said)]:
        forms = ("gamma - 1", "gamma")
        raise InputError(
            "draft_head_contradicted",
            f"config.json says that the draft head's norms are {forms[not said]}; {against[0]} can only be "
            f"{forms[said]}. Take {' or '.join(_ENCODINGS)}, or its like in {_QUANTIZATION}, out of it",
        )
    return said


def _is_raw(norm: mx.array) -> bool | None:
    """Whether a norm is gamma - 1 as it was trained, in bfloat16; None where its numbers fit both forms, or neither.

    gamma - 1 is bfloat16. gamma is one more, rounded to the dtype of the file: subtract one, round to bfloat16 and add
    one, and the same numbers come back (up to 65; the tests try them all).
    """
    values = norm.astype(mx.float32)
    less = (values - 1.0).astype(mx.bfloat16).astype(mx.float32)
    gamma = bool(mx.array_equal(1.0 + less, values))
    raw = bool(mx.array_equal(values.astype(mx.bfloat16).astype(mx.float32), values))
    return None if raw == gamma else raw


# --- for the converter -----------------------------------------------------------------------------------------------


def settled(values: Mapping[str, Any], quantized: Mapping[str, Quantization]) -> dict[str, Any]:
    """The values of config.json without the head's own fields; its quantization goes where the base model's is.

    quantized: Hugging Face name of each quantized weight of the head -> its quantization.
    """
    own = {name: value for name, value in values.items() if name not in (_FILES, _QUANTIZATION, *_ENCODINGS)}
    files = values.get(_FILES)
    if isinstance(files, dict) and (others := {name: value for name, value in files.items() if name != _FILE}):
        own[_FILES] = others
    if quantized and values.get(_QUANTIZATION):
        first, *_ = quantized.values()
        modules = {f"language_model.{name.removesuffix('.weight')}": asdict(q) for name, q in quantized.items()}
        for name in {"quantization"} | {"quantization_config"} & set(own):
            own[name] = (own.get(name) or asdict(first)) | modules
    return own
