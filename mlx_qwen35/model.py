"""The model: embed, with image embeddings in their places -> layers -> norm -> logits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.attention import GatedAttention
from mlx_qwen35.cache import Cache, Span
from mlx_qwen35.config import FULL, TextConfig
from mlx_qwen35.delta_net import GatedDeltaNet
from mlx_qwen35.errors import InputError
from mlx_qwen35.layers import MLP, RMSNorm, Rotary
from mlx_qwen35.vision import Vision


class Visual(NamedTuple):
    """What stands in the place of the placeholders of one pass."""

    rows: mx.array  # (n,) integers: where they are
    columns: mx.array
    embeddings: mx.array  # (n, D)


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is attention or DeltaNet.

    Each sum is formed together with the norm that follows it, the last one with the norm of what comes after the layer.
    """

    def __init__(self, config: TextConfig, kind: str, weights):
        super().__init__()
        self.input_layernorm = weights.norm("input_layernorm")
        if kind == FULL:
            self.self_attn = GatedAttention(config, weights.at("self_attn"))
        else:
            self.linear_attn = GatedDeltaNet(config, weights.at("linear_attn"))
        self.post_attention_layernorm = weights.norm("post_attention_layernorm")
        self.mlp = MLP(weights.at("mlp"))
        self.mixer_name = "self_attn" if kind == FULL else "linear_attn"

    def __call__(
        self, x: mx.array, normed: mx.array, span: Span, cache, following: RMSNorm, at: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """x and input_layernorm(x), each (B, T, D) -> the next x, and `following` of it.

        at: (B,), the only column of each row that is wanted; then (B, 1, D) come out.
        """
        mixed = self[self.mixer_name](normed, span, cache)
        if at is not None:
            x, mixed = (mx.take_along_axis(array, at[:, None, None], axis=1) for array in (x, mixed))
        x, normed = self.post_attention_layernorm.of_sum(x, mixed)
        return following.of_sum(x, self.mlp(normed))


class Model(nn.Module):
    """A Qwen3.5 model. Holds weights only; a conversation's memory is its `Cache`.

    `vision` is the tower, which makes embeddings of images and clips; None for a checkpoint without one.
    """

    def __init__(self, config: TextConfig, weights):
        super().__init__()
        language = weights.at("model.language_model")
        self.embed_tokens = language.embedding("embed_tokens")
        self.layers = [
            DecoderLayer(config, kind, language.at(f"layers.{i}")) for i, kind in enumerate(config.layer_types)
        ]
        self.norm = language.norm("norm")
        if not config.tie_word_embeddings:
            self.lm_head = weights.linear("lm_head")
        self.config = config
        self.rotary = Rotary(config.rope)
        self.dtype = weights.dtype  # of activations
        self.vision: Vision | None = None

    def make_cache(self, batch: int = 1) -> Cache:
        """An empty memory for `batch` rows that are read together."""
        return Cache(self.config, self.rotary, self.dtype, batch)

    def __call__(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        """tokens (B, T) integer -> logits (B, T, V) in the activation dtype, extending the cache if there is one."""
        return self.logits(self.hidden(tokens, cache))

    def hidden(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
        visual: Visual | None = None,
        positions: np.ndarray | None = None,
        at: mx.array | None = None,
        pace: Callable[[list[mx.array]], None] = lambda arrays: None,
    ) -> mx.array:
        """tokens (B, T) -> (B, T, D) after the final norm.

        lengths: of each row, how many of the T tokens are real; the outputs at the rest mean nothing. None: all.
        visual: embeddings that replace those of some tokens. positions: (3, B, T) integers, see `positions`; None goes
        on counting where the cache is. at: (B,) integers, the one column wanted of each row; then (B, 1, D), and the
        last layer's MLP and the norm compute no more than that. pace: called with what each layer gives, its memory
        included, and may have it computed.
        Raises InputError when tokens is not (B, T), its ids are not integers, or B is not the cache's.
        """
        if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer) or 0 in tokens.shape:
            raise InputError(f"tokens must be (B, T) integers, B and T at least 1, got {tokens.shape} {tokens.dtype}")
        cache = self.make_cache(tokens.shape[0]) if cache is None else cache
        if cache.batch != tokens.shape[0]:
            raise InputError(f"the cache is for {cache.batch} rows, tokens have {tokens.shape[0]}")
        with cache.reading(tokens.shape[1], lengths, positions) as span:
            x = self.embed(tokens, visual)
            normed = self.layers[0].input_layernorm(x)
            after = [*(layer.input_layernorm for layer in self.layers[1:]), self.norm]
            for layer, memory, following in zip(self.layers, cache.layers, after, strict=True):
                x, normed = layer(x, normed, span, memory, following, at if following is self.norm else None)
                pace([x, normed, *memory.arrays()])
            return normed

    def embed(self, tokens: mx.array, visual: Visual | None = None) -> mx.array:
        """tokens (B, T) -> (B, T, D) in the activation dtype, image embeddings in their places."""
        x = self.embed_tokens.look_up(tokens)
        if visual is not None:
            x[visual.rows, visual.columns] = visual.embeddings.astype(x.dtype)
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., D) after the final norm -> (..., V). Costly: 248,320 products a row, so ask for the rows you need."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head(hidden)
