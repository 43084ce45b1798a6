"""nano with adapters of random numbers, strong enough to change what it answers."""

from adapters import random_adapters

from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import TEXT, VISION
from mlx_qwen35.load import load
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor

MAPS = ("mlp.down_proj.weight", "linear_attn.out_proj.weight", "mlp.linear_fc2.weight")


def made(seed: int, vision: bool = False) -> Adapter:
    """An adapter for nano of rank 2. vision: of the vision encoder too."""
    checkpoint = open_checkpoint(resolve("nano"))
    parts = random_adapters.every_map(checkpoint, TEXT, *[VISION] * vision)
    maps = {name: shape for name, shape in parts.items() if name.endswith(MAPS)}
    return random_adapters.made(maps, seed, ranks=(2,), strength=2.0)


def nano_with(**adapters: Adapter) -> tuple[Model, Processor]:
    """nano, loaded anew, with adapters of these names in this order."""
    model, processor = load("nano")
    for name, adapter in adapters.items():
        model.adapters.add(name, adapter)
    return model, processor
