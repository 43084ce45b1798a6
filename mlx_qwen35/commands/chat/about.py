"""What a chat says of its model."""

from collections import Counter
from typing import Any

from mlx.utils import tree_flatten

from mlx_qwen35.console.safe import safe_name
from mlx_qwen35.model.layers import Linear
from mlx_qwen35.model.model import Model


def describe(name: str, model: Model) -> str:
    """Name, quantization, size in memory, context, machines where there are several, and adapters, in one short line.
    """
    kinds: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, Linear):
            dtype = str(layer.weight.dtype).removeprefix("mlx.core.")
            kinds[f"{layer.quantization.bits}-bit" if layer.quantization else dtype] += layer.weight.nbytes
    arrays: Any = tree_flatten(model.parameters())
    size = sum(model.spread.weight_bytes if model.spread else (array.nbytes for _, array in arrays))
    number = f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
    kind = max(kinds, key=lambda kind: kinds[kind])
    parts = [name, kind, number, f"context {model.config.max_position_embeddings:,}"]
    parts += [str(model.spread)] if model.spread else []
    parts += described(model)
    return " · ".join(parts)


def described(model: Model) -> list[str]:
    """The adapters of a model, in words; none where it has none."""
    names = [safe_name(name) for name in model.adapters.names]
    if not names:
        return []
    way = "" if model.adapters.default else ", and /set adapter NAME takes one"
    return [f"adapter{'s' * (len(names) > 1)} {', '.join(names)}{way}"]
