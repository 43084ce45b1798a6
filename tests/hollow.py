"""Checkpoints of real sizes whose weights are holes."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes, vision_shapes


def hollow(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of the published form whose weights are holes, as long as the weights would be."""
    folder.mkdir()
    parsed = parse_config(config)
    shapes = text_shapes(parsed.text) | vision_shapes(parsed.vision) | mtp_shapes(parsed.text)
    names, weight_map = list(shapes), {}
    for number, part in enumerate((names[:300], names[300:]), 1):
        file, header, position = f"model.safetensors-{number:05d}-of-00002.safetensors", {}, 0
        for name in part:
            end = position + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": (position, end)}
            position = end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + position)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}".ljust(12_000_000))
    (folder / "merges.txt").write_text("x" * 3_000_000)
    return folder
