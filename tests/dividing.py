"""Models whose parts are held by several machines, in one process: the sums between them are done by hand."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import reduce

import mlx.core as mx
import numpy as np
from geometries import changed

from mlx_qwen35.checkpoint.adapter_choice import Chosen
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.share import Share
from mlx_qwen35.load import load_model
from mlx_qwen35.model.decoder import through
from mlx_qwen35.model.model import Model

# Four key heads, key/value heads and groups in each row of out_proj, down_proj and o_proj: for 2 and 4 machines. The
# vocabulary does not divide by 4.
FOURS = changed(
    geometry("tiny"), num_attention_heads=8, num_key_value_heads=4, linear_num_key_heads=4, linear_num_value_heads=12,
    head_dim=64, intermediate_size=512, vocab_size=1022, hidden_size=128,
)  # fmt: skip
FOURS["text_config"]["rope_parameters"]["mrope_section"] = [3, 3, 2]
SIZES = (2, 4)
SAME = 1e-5  # sums of parts round differently than sums of the whole


def prompt(count: int = 20, vocabulary: int = 1022) -> mx.array:
    return mx.array(np.random.default_rng(6).integers(0, vocabulary, (1, count)).astype(np.int32))


def loaded(checkpoint: Checkpoint, share: Share | None = None, dtype: mx.Dtype = mx.float32, adapter=None) -> Model:
    chosen = None if adapter is None else Chosen({"own": adapter}, "own")
    return load_model(checkpoint, dtype, "a model", adapters=chosen, share=share)


def divided(checkpoint: Checkpoint, size: int, **options) -> list[Model]:
    """The models of all machines of a tensor split."""
    return [loaded(checkpoint, Share.tensor(checkpoint.config.text, rank, size), **options) for rank in range(size)]


def piped(checkpoint: Checkpoint, *ends: int, **options) -> list[Model]:
    """The models of all machines of a pipeline, whose ranges of layers end before these."""
    ranges = [range(*edges) for edges in zip((0, *ends), ends, strict=False)]
    return [loaded(checkpoint, share, **options) for share in Share.pipelines(checkpoint.config.text, ranges)]


def of_sums(ranks: Sequence[Model], tokens: mx.array) -> mx.array:
    """The logits of a tensor split: the machines' parts of each layer, one after the other, and added."""
    with ExitStack() as stack:
        caches = [rank.make_cache(len(tokens)) for rank in ranks]
        passes = [
            (rank, cache, stack.enter_context(cache.forward(tokens.shape[1], None, None, False, rank.active(cache))))
            for rank, cache in zip(ranks, caches, strict=True)
        ]
        x, start = mx.zeros((*tokens.shape, ranks[0].held.hidden_size)), 0
        for rank, _, context in passes:
            own, rows = tokens - start, len(rank.embed_tokens.weight)
            there = (own >= 0) & (own < rows)
            x = x + mx.where(there[..., None], rank.embed(mx.where(there, own, 0), None, context.adapters), 0)
            start += rows
        for i, layer in enumerate(ranks[0].layers):
            normed = layer.input_layernorm(x)
            for rank, cache, context in passes:
                mixer = rank.layers[i][layer.mixer_name]
                x = x + mixer(normed, rank.rotary.table(context.positions), context, cache.layers[i])
            normed = layer.post_attention_layernorm(x)
            x = reduce(mx.add, [rank.layers[i].mlp(normed, context.adapters) for rank, _, context in passes], x)
        hidden = ranks[0].norm(x)
        out = mx.concatenate([rank.logits(hidden, context.adapters) for rank, _, context in passes], axis=-1)
        mx.eval(out)
    return out


def of_pipeline(ranks: Sequence[Model], tokens: mx.array) -> mx.array:
    """The logits of a pipeline: the machines' layers, one after the other; the norm and the head of the first."""
    first, x, delta = ranks[0], None, None
    for rank in ranks:
        cache = rank.make_cache(len(tokens))
        with cache.forward(tokens.shape[1], None, None, False, rank.active(cache)) as context:
            x = rank.embed(tokens, None, context.adapters) if x is None else x + delta
            x, delta = through(rank.layers, x, rank.rotary.table(context.positions), context, cache.layers)
    out = first.logits(first.norm.of_sum(x, delta)[1], first.active(first.make_cache(len(tokens))))
    mx.eval(out)
    return out


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(np.nan_to_num(np.abs(np.array(a) - np.array(b)), nan=np.inf).max())
