"""Changed geometries of random checkpoints."""

import copy
from collections.abc import Mapping
from typing import Any

from mlx_qwen35.checkpoint.config import FULL, LINEAR


def changed(config: Mapping[str, Any], **text_fields: Any) -> dict[str, Any]:
    """A copy of a config.json with some of its text fields replaced; layer_types follows num_hidden_layers."""
    new: dict[str, Any] = copy.deepcopy(dict(config))
    text = new["text_config"]
    text.update(text_fields)
    if "num_hidden_layers" in text_fields and "layer_types" not in text_fields:
        every = text["full_attention_interval"]
        text["layer_types"] = [FULL if (i + 1) % every == 0 else LINEAR for i in range(text["num_hidden_layers"])]
    if "tie_word_embeddings" in text_fields:
        new["tie_word_embeddings"] = text_fields["tie_word_embeddings"]
    if "hidden_size" in text_fields and new.get("vision_config"):
        new["vision_config"]["out_hidden_size"] = text_fields["hidden_size"]
    return new
