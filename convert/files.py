"""What stands beside the weights in the folder to be written: config.json and generation_config.json."""

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint import Quantization
from mlx_qwen35.config import Config, read_json
from mlx_qwen35.convert.packing import Packing, config_entry
from mlx_qwen35.convert.source import CLAIMS

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # option -> safetensors' name
TAG = {"format": 1, "norms": "zero-centred"}
_END_OF_TURN = "<|im_end|>"


def new_config(
    values: Mapping[str, Any], packing: Packing | None, keep: bool, packed: Mapping[str, Quantization], dtype: str
) -> dict[str, Any]:
    """The source's config.json with its dtype fields renewed, the quantization as MLX programs read it, and our tag.

    packed: Hugging Face name of a weight -> how it is packed; `keep` says that the source's entry tells just that.
    """
    config = copy.deepcopy(dict(values))
    name = next(option for option, stored in DTYPES.items() if stored == dtype)
    parts = [part for part in (config, config.get("text_config"), config.get("vision_config")) if part]
    fields = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in fields or [(config.get("text_config", config), "dtype")]:
        part[key] = name
    if not (keep and packed):
        for part, key in itertools.product(parts, CLAIMS):
            part.pop(key, None)
        config.pop("mlx_qwen35", None)  # comes last
    if packing:
        entry = config_entry(packing, packed)
        config |= {"quantization": entry, "quantization_config": entry}
    return config | {"mlx_qwen35": TAG}


def generation_config(folder: Path, config: Config) -> dict[str, Any] | None:
    """A generation_config.json with the end-of-turn token and those that config.json names; None when there is none."""
    turn = _end_of_turn(folder)
    ends = list(dict.fromkeys(([] if turn is None else [turn]) + list(config.eos_token_ids)))
    return {"eos_token_id": ends} if ends else None


def _end_of_turn(folder: Path) -> int | None:
    if (folder / "tokenizer_config.json").is_file():
        for number, token in (read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
            if token.get("content") == _END_OF_TURN:
                return int(number)
    if (folder / "tokenizer.json").is_file():
        for token in read_json(folder / "tokenizer.json").get("added_tokens") or []:
            if token.get("content") == _END_OF_TURN:
                return token["id"]
    return None
