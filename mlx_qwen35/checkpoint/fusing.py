"""A checkpoint with an adapter fused into it: its tensors, read where they are stored, whole or some rows at a time."""

from dataclasses import replace

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter, fused
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import HEAD, TABLE
from mlx_qwen35.errors import InputError


def with_own_head(checkpoint: Checkpoint, adapter: Adapter | None) -> Checkpoint:
    """The checkpoint that an adapter is fused into: with a head of its own where head and table come to differ.

    Such a head begins as the table that it was tied to. Raises InputError where that is quantized.
    """
    text = checkpoint.config.text
    if not (adapter and adapter.unties and text.tie_word_embeddings):
        return checkpoint
    if checkpoint.quantization(TABLE):
        raise InputError(
            "adapter_unsupported",
            f"the adapter {adapter.path} makes the head differ from the table of tokens that it is tied to, which is "
            f"quantized in {checkpoint.folder}. Fuse it with the unquantized model",
        )
    config = replace(checkpoint.config, text=replace(text, tie_word_embeddings=False))
    own = HEAD in adapter.replaced or TABLE not in adapter.stored
    head = checkpoint.entries[TABLE] if own else adapter.stored[TABLE]
    return replace(checkpoint, config=config, entries={**checkpoint.entries, HEAD: head})


def fuse(adapter: Adapter, name: str, weight: mx.array, rows: mx.array | slice = slice(None)) -> mx.array:
    """A tensor with the low-rank part that an adapter has for it: float32, of weight's shape.

    weight: the values in raw layout, of the whole tensor or of these rows along its first axis.
    """
    pair, magnitude = adapter.pairs[name], adapter.magnitudes.get(name)
    own = None if magnitude is None else magnitude[rows]
    return fused(weight, pair._replace(b=pair.b[rows]), own)
