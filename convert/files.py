"""The files beside the weights: config.json and generation_config.json as they are written, copies, the licence."""

import copy
import fnmatch
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.config import Config
from mlx_qwen35.checkpoint.dtypes import STORED
from mlx_qwen35.checkpoint.names import TEXT, VISION, hugging_face_name
from mlx_qwen35.checkpoint.rope_fields import OLDER, rope_parameters
from mlx_qwen35.convert.recipes import Recipe
from mlx_qwen35.convert.source import CLAIMS
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import Fields, read_json
from mlx_qwen35.prompt.tokenizer import TOKENIZER_BYTES
from mlx_qwen35.quantization import Quantization
from mlx_qwen35.values import is_whole, shown

# Tokenizer, template, preprocessors, licence: all that belongs to a checkpoint beside weights and config.json.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "quality.json", "evaluation.json", "*.index.json", ".*")
TAG = {"format": 1, "norms": "zero-centred"}
_END_OF_TURN = "<|im_end|>"
_LICENSES = {"apache-2.0": ("Apache License", "Version 2.0"), "mit": ("MIT License", "Permission is hereby granted")}


def new_config(
    values: Mapping[str, Any], recipe: Recipe | None, quantized: Mapping[str, Quantization], dtype: str
) -> dict[str, Any]:
    """The source's config.json with its dtype fields renewed, the quantization as MLX programs read it, and our tag.

    Older rotary fields are gathered in rope_parameters: where these are absent, mlx-lm takes defaults of its own.
    recipe: None keeps the quantization entry of the source. quantized: Hugging Face name of each quantized weight ->
    its quantization.
    """
    config = copy.deepcopy(dict(values))
    name = next(option for option, stored in STORED.items() if stored == dtype)
    parts = [part for part in (config, config.get("text_config"), config.get("vision_config")) if part]
    fields = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    text = config.get("text_config", config)
    for part, key in fields or [(text, "dtype")]:
        part[key] = name
    if any(text.get(older) is not None for older in OLDER):
        text["rope_parameters"] = rope_parameters(Fields(text, "config.json"))
        for older in OLDER:
            text.pop(older, None)
    if recipe or not quantized:
        for part, key in itertools.product(parts, CLAIMS):
            part.pop(key, None)
        config.pop("mlx_qwen35", None)  # comes last
    if recipe and recipe.bulk:
        entry = _quantization_entry(recipe.bulk, quantized)
        config |= {"quantization": entry, "quantization_config": entry}
    return config | {"mlx_qwen35": TAG}


def _quantization_entry(bulk: Quantization, quantized: Mapping[str, Quantization]) -> dict[str, Any]:
    """The `quantization` of config.json, as mlx-lm and mlx-vlm read it: of the bulk, and of each other module."""
    others = {
        peer_module(name): asdict(quantization)
        for name, quantization in quantized.items()
        if quantization != bulk or name.startswith(VISION)  # mlx-vlm quantizes no part of the encoder by the bulk
    }
    return asdict(bulk) | others


def peer_module(name: str) -> str:
    """The module that mlx-lm and mlx-vlm make of a weight of this Hugging Face name."""
    module = hugging_face_name(name).removesuffix(".weight")
    for own, theirs in ((VISION, "vision_tower."), (TEXT, "language_model.model.")):
        if module.startswith(own):
            return theirs + module.removeprefix(own)
    return f"language_model.{module}"


def belongs(file: Path, folder: Path) -> bool:
    """Whether a file lies in the folder, or in the hub's cache of its repository.

    A link may lead anywhere, such as to a secret key, which would be published with the converted folder.
    """
    folder, file = folder.resolve(), file.resolve()
    cached = [part.parent for part in folder.parents if part.name == "snapshots"]
    homes = [folder, *(part / "blobs" for part in cached if part.name.startswith("models--"))]
    return any(home in file.parents for home in homes)


def beside_weights(folder: Path) -> tuple[Path, ...]:
    """The files to copy. Warns of links that lead out of the folder, which are not copied."""

    def fits(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    files = [file for file in sorted(folder.iterdir()) if fits(file.name, _COPIED) and not fits(file.name, _NOT_COPIED)]
    files = [file for file in files if file.is_file()]
    if foreign := [file.name for file in files if not belongs(file, folder)]:
        warnings.warn(
            f"{', '.join(foreign)} of {folder} are links that lead out of it, and are not copied. What belongs to the "
            "checkpoint must lie in its folder",
            UserWarning,
            stacklevel=3,
        )
    return tuple(file for file in files if file.name not in foreign)


def generation_config(folder: Path, config: Config) -> dict[str, Any] | None:
    """The source's generation_config.json with all end tokens: its own, the end of a turn, and those of config.json.

    None where the source's file names them all and is copied, or where there are no end tokens.
    """
    file, turn = folder / "generation_config.json", _end_of_turn(folder, config.text.vocab_size)
    values = read_json(file) if file.is_file() and belongs(file, folder) else {}
    own = values.get("eos_token_id")
    own = own if isinstance(own, list) else [] if own is None else [own]
    ends = list(dict.fromkeys([*own, *([] if turn is None else [turn]), *config.eos_token_ids]))
    return {**values, "eos_token_id": ends} if set(ends) - set(own) else None


def _end_of_turn(folder: Path, vocabulary: int) -> int | None:
    settings, tokenizer = folder / "tokenizer_config.json", folder / "tokenizer.json"
    found: list[Any] = []
    if settings.is_file():
        named = Fields(read_json(settings), settings.name).object("added_tokens_decoder") or {}
        found += [int(n) if n.isdecimal() else n for n, token in named.items() if _ends_turn(token)]
    if tokenizer.is_file() and not found:
        fields = Fields(read_json(tokenizer, TOKENIZER_BYTES), tokenizer.name)
        tokens = fields.get("added_tokens", list) if fields.has("added_tokens") else []
        found += [token.get("id") for token in tokens if _ends_turn(token)]
    if found and not (is_whole(found[0]) and 0 <= found[0] < vocabulary):
        raise InputError(
            "tokenizer_invalid",
            f"the tokenizer of {folder} must give {_END_OF_TURN} a token id, 0 to {vocabulary - 1}; it gives "
            f"{shown(found[0])}. Download it again",
        )
    return found[0] if found else None


def _ends_turn(token: Any) -> bool:
    return isinstance(token, dict) and token.get("content") == _END_OF_TURN


def find_license(source: Path) -> str | None:
    """The licence as Hugging Face writes it, by the source's card, else by its LICENSE; None where it is unknown."""
    card = source / "README.md"
    if card.is_file() and belongs(card, source):
        front = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if found := front and re.search(r"^license:[ \t]*['\"]?([\w.-]+)['\"]?[ \t]*$", front[1], re.MULTILINE):
            return found[1]
    for file in sorted(source.glob("LICENSE*")):
        if not (file.is_file() and belongs(file, source)):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for name, marks in _LICENSES.items():
            if all(mark in text for mark in marks):
                return name
    return None
