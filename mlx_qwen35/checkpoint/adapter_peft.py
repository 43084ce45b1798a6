"""PEFT's adapters, as peft 0.21 writes them, and our own file of a draft head's low-rank parts beside them.

A key is base_model.model., the module's name in transformers, and what the tensor is there. Modules come from the
tensors: target_modules may hold the mere ends of names.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.adapter_parts import (
    BASE,
    CONFIG,
    MAGNITUDE,
    WHOLE,
    A,
    B,
    Declared,
    Parts,
    Stored,
    header_of,
    invalid,
    reading,
)
from mlx_qwen35.checkpoint.adapter_patterns import Patterns
from mlx_qwen35.checkpoint.folder import is_file
from mlx_qwen35.checkpoint.names import MTP, TEXT, hugging_face_name
from mlx_qwen35.checkpoint.tensors import Entry, open_header
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import WIDTH, Fields
from mlx_qwen35.values import shown

TENSORS, PICKLED, DRAFT_HEAD = "adapter_model.safetensors", "adapter_model.bin", "mtp_adapter.safetensors"
PREFIX = "base_model.model."
# The end of a key, the kind of the tensor, and whether it is transposed against `adapter.Pair`.
ENDS = {
    ".lora_A.weight": (A, False), ".lora_B.weight": (B, False), ".lora_magnitude_vector": (MAGNITUDE, False),
    ".lora_embedding_A": (B, True), ".lora_embedding_B": (A, True), ".base_layer.weight": (BASE, False),
}  # fmt: skip

# Fields that say how an adapter was made, or what the tensors say better. Those of ms-swift come last.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type", "velora_config", "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio",
}  # fmt: skip
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
_INITIAL = (True, False, "gaussian", "eva", "orthogonal", "mica")  # which leave the weights of the model as they were
_CHANGES = {  # what the refused fields stand for, in words
    "alora_invocation_tokens": "aLoRA, which begins at an invocation", "arrow_config": "Arrow, which chooses adapters",
    "bias": "trained biases", "fan_in_fan_out": "weights stored transposed", "kasa_config": "KaSA",
    "layer_replication": "layers that are there several times", "lora_bias": "a bias of B",
    "megatron_config": "Megatron's layers", "monteclora_config": "MonteCLoRA",
    "target_parameters": "low-rank parts of bare parameters", "trainable_token_indices": "rows of single tokens",
    "use_bdlora": "BD-LoRA, with matrices of blocks", "use_qalora": "QA-LoRA, which pools its input",
}  # fmt: skip


def parts_of(folder: Path, config: Mapping[str, Any]) -> Parts:
    """The adapter in a folder of PEFT. InputError: adapter_not_found, adapter_invalid, adapter_unsupported."""
    with reading(folder):
        _check_kind(folder, config)
    if is_file(folder / PICKLED) and not is_file(folder / TENSORS):
        raise InputError(
            "adapter_unsupported",
            f"an adapter's tensors must be in {TENSORS}; {folder} has {PICKLED}, a pickle, which can run any code",
            "Load it with peft and save it again: save_pretrained(FOLDER, safe_serialization=True)",
        )
    entries = header_of(folder, TENSORS).entries
    with reading(folder):
        fields = Fields(config, CONFIG)
        scales = _Scales(fields)
        parts = Parts(folder, "peft", mlx=False, dora=fields.has("use_dora") and fields.get("use_dora", bool))
        _check_prefixes(folder, entries)
        for key, entry in entries.items():
            _add(parts, key, entry, scales)
    return parts


def _add(parts: Parts, key: str, entry: Entry, scales: "_Scales") -> None:
    path = key.removeprefix(PREFIX)
    for end, (kind, transposed) in ENDS.items():
        if path.endswith(end):
            module = path.removesuffix(end)
            declared = None if kind == BASE else scales.of(module)
            parts.add(hugging_face_name(f"{module}.weight"), kind, Stored(entry, transposed), declared)
            return
    parts.add(hugging_face_name(path), WHOLE, Stored(entry))


def add_draft_head(parts: Parts) -> None:
    """Add the low-rank parts of the draft head, from a file of ours. Its metadata has rank and alpha."""
    folder = parts.folder
    if not is_file(folder / DRAFT_HEAD):
        return
    with reading(folder):
        entries, metadata = open_header(folder / DRAFT_HEAD)
    try:
        rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
    except (KeyError, ValueError) as error:
        raise invalid(folder, f"the metadata of {DRAFT_HEAD} must hold rank and alpha, as numbers") from error
    if not (0 < rank <= WIDTH and math.isfinite(alpha)):
        raise invalid(folder, f"{DRAFT_HEAD} has rank {rank} and alpha {alpha}")
    for key, entry in entries.items():
        path = key.removeprefix(PREFIX)
        end = next(filter(path.endswith, (".lora_A.weight", ".lora_B.weight")), None)
        if end is None or not path.startswith(MTP):
            raise invalid(folder, f"{DRAFT_HEAD} holds {key[:200]}, which is no low-rank part of a draft head")
        parts.add(f"{path.removesuffix(end)}.weight", ENDS[end][0], Stored(entry), Declared(rank, alpha / rank))


# --- the configuration -----------------------------------------------------------------------------------------------


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    """InputError for another kind than plain LoRA and DoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _unsupported(folder, f"peft_type must be LORA, got {shown(kind)}")
    initial = config.get("init_lora_weights")
    if initial is not None and initial not in _INITIAL:
        raise _unsupported(
            folder,
            f"init_lora_weights is {shown(initial)}: its first values were taken out of the model's weights, which it "
            "needs changed",
            "Let PEFT convert it to plain LoRA: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...)",
        )
    for name, value in config.items():
        if name in _HARMLESS or name in _USED or name == "init_lora_weights" or not value:
            continue
        if name == "bias" and value == "none":
            continue
        raise _unsupported(folder, f"{name} is {shown(value)}: {_CHANGES.get(name, 'not known here')}")


def _unsupported(folder: Path, fault: str, advice: str = "") -> InputError:
    advice = advice or "Merge it with the program that made it (merge_and_unload), and load the result"
    return InputError("adapter_unsupported", f"the adapter {folder} is of a kind that is not run: {fault}", advice)


def _check_prefixes(folder: Path, entries: Mapping[str, Entry]) -> None:
    """InputError where modules of the text model have the names of two of transformers' classes."""
    forms: dict[str, str] = {}
    for key in entries:
        name = hugging_face_name(key.removeprefix(PREFIX))
        if name.startswith(TEXT):
            forms.setdefault(key.removesuffix(name.removeprefix(TEXT)), key)
    if len(forms) > 1:
        raise invalid(folder, f"it mixes the names of two models, as in {' and '.join(sorted(forms.values())[:2])}")


class _Scales:
    """Rank and scale of each module. InputError for values that are none, or expressions that are not followed."""

    def __init__(self, config: Fields):
        self._patterns = Patterns()
        self._rank, self._alpha = config.whole("r", 1, WIDTH), config.number("lora_alpha", -1e9, 1e9)
        self._root = config.has("use_rslora") and config.get("use_rslora", bool)
        ranks, alphas = (Fields(config.object(n) or {}, n) for n in ("rank_pattern", "alpha_pattern"))
        self._ranks = [(self._compiled(ranks, key), ranks.whole(key, 1, WIDTH)) for key in ranks.values]
        self._alphas = [(self._compiled(alphas, key), alphas.number(key, -1e9, 1e9)) for key in alphas.values]

    def of(self, module: str) -> Declared:
        """Of a module, by its name in transformers: the first expression that fits the end of the name counts."""
        try:
            rank = next((rank for fits, rank in self._ranks if fits(module)), self._rank)
            alpha = next((alpha for fits, alpha in self._alphas if fits(module)), self._alpha)
        except ValueError as error:
            raise InputError(
                "config_field_invalid", f"{CONFIG}: rank_pattern and alpha_pattern must be simpler: {error}"
            ) from error
        return Declared(rank, alpha / (math.sqrt(rank) if self._root else rank))

    def _compiled(self, patterns: Fields, key: str) -> Callable[[str], bool]:
        try:
            return self._patterns.compiled(key)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            told = f"below an expression that fits names ({error})"
            raise patterns.invalid(key, told, patterns.values[key]) from error
