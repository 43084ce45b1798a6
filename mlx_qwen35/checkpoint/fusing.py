"""What an adapter makes of a tensor, whole or some rows of it."""

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter, fused


def changed_by(adapter: Adapter) -> tuple[str, ...]:
    """The Hugging Face names of the tensors that an adapter changes."""
    return tuple(dict.fromkeys((*adapter.pairs, *adapter.replaced, *adapter.magnitudes)))


def fuse(adapter: Adapter, name: str, weight: mx.array, rows: mx.array | slice = slice(None)) -> mx.array:
    """What an adapter makes of the tensor of this Hugging Face name: float32, of weight's shape.

    weight: the checkpoint's values in raw layout, or these rows of them (along the first axis). A whole tensor of the
    adapter takes their place before a low-rank part is added.
    """
    pair, magnitude, whole = adapter.pairs.get(name), adapter.magnitudes.get(name), adapter.replaced.get(name)
    if whole is not None:
        weight = whole[rows].reshape(weight.shape)
    own = None if pair is None else pair._replace(b=pair.b[rows])
    return fused(weight, own, None if magnitude is None else magnitude[rows])
