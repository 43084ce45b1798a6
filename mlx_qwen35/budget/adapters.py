"""What the low-rank parts of adapters take in memory, from shapes: as model/lora.py stacks them."""

import math
from collections.abc import Hashable, Sequence

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import ATTENTION_INPUTS, DELTA_INPUTS, HEAD, MLP_INPUTS

_JOINED = {name: names for names in (DELTA_INPUTS, ATTENTION_INPUTS, MLP_INPUTS) for name in names}


def adapter_bytes(checkpoint: Checkpoint, adapters: Sequence[Adapter], dtype: mx.Dtype, joined: bool) -> int:
    """Bytes of all low-rank parts, in the dtype of activations; those of the draft head too, which is loaded later.

    joined: whether projections of one input are joined, as on a GPU. Then B has zeros where the rows of one map meet
    the ranks of another.
    """
    text, numbers = checkpoint.config.text, 0
    products: dict[Hashable, dict[str, tuple[int, ...]]] = {}
    for name, shape in (checkpoint.shapes | {HEAD: (text.vocab_size, text.hidden_size)}).items():
        products.setdefault(_product(checkpoint, name) if joined else name, {})[name] = shape
    for maps in products.values():
        ranks = [sum(len(adapter.pairs[name].a) for name in maps if name in adapter.pairs) for adapter in adapters]
        if any(ranks):
            width, rows = math.prod(next(iter(maps.values()))[1:]), sum(shape[0] for shape in maps.values())
            numbers += sum(map(bool, ranks)) * max(ranks) * (width + rows)
    return numbers * dtype.size


def _product(checkpoint: Checkpoint, name: str) -> Hashable:
    """The product of a weight: the same for those that are joined, which are quantized alike."""
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    return (stem, _JOINED[last], checkpoint.quantization(name)) if last in _JOINED else name
