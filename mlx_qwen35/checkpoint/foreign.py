"""Folders of programs whose quantization is not read here: GPTQ, AWQ, bitsandbytes and the like.

Such a folder lacks dozens of tensors and has dozens of others. An error that names the program says more than lists.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.folder import is_file
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import read_json
from mlx_qwen35.options import spelled

# Where a folder's JSON files name the program: file, field (None: the whole), and the program by default.
_CLAIMS = (
    ("config.json", "quantization", None), ("config.json", "quantization_config", None),
    ("config.json", "compression_config", "compressed-tensors"), ("hf_quant_config.json", "quantization", "modelopt"),
    ("quantize_config.json", None, "gptq"), ("quant_config.json", None, "awq"),
)  # fmt: skip

# The program by the names of tensors: the first pattern that fits.
_SIGNS = (
    (r"\.(absmax|quant_map|nested_absmax|quant_state\..*|SCB)$", "bitsandbytes"),
    (r"\.(weight_packed|weight_global_scale|weight_shape)$", "compressed-tensors"),
    (r"\.weight_scale_2$", "modelopt"),
    (r"\.W_q$", "hqq"),
    (r"\.(weight\._data|weight_qtype)$", "quanto"),
    (r"_weight_qdata$", "torchao"),
    (r"\.(codes|codebooks)$", "aqlm"),
    (r"(_|\.weight_)blocks$", "mxfp4"),
    (r"\.g_idx$", "gptq"),
    (r"\.(qweight|qzeros)$", "gptq or awq"),
    (r"\.(weight_scale|weight_scales|input_scale)$", "FP8 or integers by tensor or row"),
)  # fmt: skip
_LORA = re.compile(r"\.(lora_[ABab]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\b|^base_model\.")
_ASK = (
    "give the unquantized original, a folder quantized by an MLX program, or to the converter FP8 with block scales "
    "(weight_scale_inv)"
)


def refuse(folder: Path, unexpected: Collection[str], dtypes: Collection[str]) -> None:
    """InputError that names the program, where the folder shows it.

    unexpected: names of tensors that the model does not have. dtypes: unexpected dtypes of the model's own tensors.
    """
    if not unexpected and not dtypes:
        return
    if lora := next(filter(_LORA.search, unexpected), None):
        raise InputError(
            "adapter_unmerged",
            f"{folder} holds an adapter that is not merged ({lora}); give the model that it was trained on, and the "
            f"adapter's own folder as {spelled('adapter')}, or merge it (merge_and_unload in PEFT, mlx_lm.fuse in MLX) "
            "and give the folder of the result",
        )
    if method := _claimed(folder) or _told_by(unexpected, dtypes):
        raise InputError(
            "quantization_unsupported", f"{folder} is quantized by {method}, in a way that is not read here; {_ASK}"
        )


def _claimed(folder: Path) -> str | None:
    """The program by a folder's JSON files; None for an MLX program, which names no method."""
    for file, field, default in _CLAIMS:
        whole = read_json(folder / file) if is_file(folder / file) else {}
        inner = whole.get("text_config")
        for values in (whole, inner) if isinstance(inner, dict) else (whole,):
            claim = values.get(field) if field else values
            if not isinstance(claim, dict) or not claim:
                continue
            method = _method(claim) or default or _algorithm(claim)
            if method or field == "quantization":
                return method and f"{method!r} ({f'{field} of ' if field else ''}{file})"
    return None


def _method(claim: Mapping[str, Any]) -> str | None:
    producer = claim.get("producer")
    names = [claim.get("quant_method"), producer.get("name") if isinstance(producer, dict) else None]
    names += ["bitsandbytes"] if any(name.startswith(("load_in_", "bnb_")) for name in claim) else []
    return next((name[:100] for name in names if isinstance(name, str)), None)


def _algorithm(claim: Mapping[str, Any]) -> str | None:
    name = claim.get("quant_algo")
    return name[:100] if isinstance(name, str) else None


def _told_by(names: Collection[str], dtypes: Collection[str]) -> str | None:
    for pattern, method in _SIGNS:
        if any(map(re.compile(pattern).search, names)):
            return method
    return "FP8 without factors" if any(dtype.startswith("F8") for dtype in dtypes) else None
