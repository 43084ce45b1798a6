"""Adapters of random numbers in memory, for every map of a checkpoint."""

from collections.abc import Callable, Collection
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.adapter import Adapter, Pair, fused
from mlx_qwen35.checkpoint.arrays import lazy_arrays
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import HEAD, TABLE, TEXT
from mlx_qwen35.checkpoint.shapes import is_matrix


def every_map(checkpoint: Checkpoint, *prefixes: str) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of all that may have a low-rank part: of the text model, or of other parts."""
    wanted = prefixes or (TEXT, HEAD)
    shapes = checkpoint.shapes | {HEAD: (checkpoint.config.text.vocab_size, checkpoint.config.text.hidden_size)}
    return {
        name: (shape[0], int(np.prod(shape[1:])))
        for name, shape in shapes.items()
        if name.startswith(wanted) and (is_matrix(name, shape) or name.endswith("patch_embed.proj.weight"))
    }


def made(
    maps: dict[str, tuple[int, int]], seed: int = 0, ranks: Collection[int] = (4,), only: Callable[[str], bool] = bool,
    strength: float = 0.5, **more,
) -> Adapter:  # fmt: skip
    """An adapter for these maps with these ranks in turn. Its part of an output is about `strength` of its input."""
    rng, turn, pairs = np.random.default_rng(seed), list(ranks), {}
    for i, (name, (out, width)) in enumerate(maps.items()):
        if only(name):
            rank = turn[i % len(turn)]
            a, b = rng.normal(size=(rank, width)) / width**0.5, rng.normal(size=(out, rank)) / rank**0.5
            pairs[name] = Pair(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), strength)
    mx.eval(pairs)
    return Adapter(Path(f"adapter-{seed}"), "peft", pairs, fingerprint=f"{seed:064x}", **more)


def fused_into(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the products of an adapter in its weights, quantized ones dequantized."""
    text = checkpoint.config.text
    whole = dict(adapter.replaced)
    for name, pair in adapter.pairs.items():
        stored = TABLE if name == HEAD and text.tie_word_embeddings else name
        whole[name] = fused(dequantized(checkpoint, stored), pair)
    if text.tie_word_embeddings and HEAD not in whole and TABLE in whole:
        whole[HEAD] = dequantized(checkpoint, TABLE)
    return checkpoint.replacing(whole)


def dequantized(checkpoint: Checkpoint, name: str) -> mx.array:
    """A weight in float32."""
    how, stem = checkpoint.quantization(name), name.removesuffix("weight")
    if how is None:
        return lazy_arrays(checkpoint, [name])[name].astype(mx.float32)
    weight, *factors = (lazy_arrays(checkpoint, [stem + part])[stem + part] for part in ("weight", "scales", "biases"))
    factors = [array.astype(mx.float32) for array in factors]  # as a model in float32 has them
    return mx.dequantize(weight, *factors, group_size=how.group_size, bits=how.bits, mode=how.mode)


