"""What a chat says of its model."""

from collections import Counter
from typing import Any

from mlx.utils import tree_flatten

from mlx_qwen35.model.layers import Linear
from mlx_qwen35.model.model import Model


def describe(name: str, model: Model) -> str:
    """Name, quantization, size in memory and context, in one short line."""
    kinds: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, Linear):
            dtype = str(layer.weight.dtype).removeprefix("mlx.core.")
            kinds[f"{layer.quantization.bits}-bit" if layer.quantization else dtype] += layer.weight.nbytes
    arrays: Any = tree_flatten(model.parameters())
    size = sum(array.nbytes for _, array in arrays)
    number = f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
    kind = max(kinds, key=lambda kind: kinds[kind])
    return f"{name} · {kind} · {number} · context {model.config.max_position_embeddings:,}"
