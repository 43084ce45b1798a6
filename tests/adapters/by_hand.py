"""Adapters of random numbers, in memory: strong enough to change what nano answers."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter, Pair
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.shapes import text_shapes, vision_shapes
from mlx_qwen35.load import load
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor

TEXT_MAPS = ("mlp.down_proj.weight", "linear_attn.out_proj.weight")
VISION_MAPS = ("mlp.linear_fc2.weight",)


def made(seed: int, vision: bool = False, scale: float = 0.2) -> Adapter:
    """An adapter for nano of rank 2. vision: of the vision encoder too."""
    config = open_checkpoint(resolve("nano")).config
    assert config.vision
    shapes = {name: shape for name, shape in text_shapes(config.text).items() if name.endswith(TEXT_MAPS)}
    if vision:
        shapes |= {name: shape for name, shape in vision_shapes(config.vision).items() if name.endswith(VISION_MAPS)}
    keys = iter(mx.random.split(mx.random.key(seed), 2 * len(shapes)))
    pairs = {
        name: Pair(mx.random.normal((2, width), key=next(keys)), mx.random.normal((out, 2), key=next(keys)), scale)
        for name, (out, width) in shapes.items()
    }
    mx.eval(pairs)
    return Adapter(Path("by-hand"), "peft", pairs, fingerprint=f"{seed:032x}{int(vision):032x}")



def nano_with(**adapters: Adapter) -> tuple[Model, Processor]:
    """nano, loaded anew, with adapters of these names in this order."""
    model, processor = load("nano")
    add(model, adapters)
    return model, processor


def add(model: Model, adapters: Mapping[str, Adapter]) -> None:
    for name, adapter in adapters.items():
        model.adapters.add(name, adapter)
