"""The decoder layers, and the forward pass through them."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache.layer import ForwardContext, LayerCache
from mlx_qwen35.checkpoint.config import FULL, TextConfig
from mlx_qwen35.checkpoint.names import MLP_INPUTS
from mlx_qwen35.kernels.elementwise import silu_product
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.model.attention import GatedAttention
from mlx_qwen35.model.delta_net import GatedDeltaNet
from mlx_qwen35.model.layers import RMSNorm
from mlx_qwen35.model.rotary import Table
from mlx_qwen35.model.weights import Weights


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, weights: Weights):
        super().__init__()
        self.gate_up = weights.joined(*MLP_INPUTS)
        self.down_proj = weights.linear("down_proj")

    def __call__(self, x: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        gate, up = self.gate_up(x, adapters)
        return self.down_proj(silu_product(gate, up), adapters)


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is attention or DeltaNet.

    Each sum is one operation with the norm after it. The MLP's output stays apart, as `delta`: the next layer adds it,
    or the final norm.
    """

    def __init__(self, config: TextConfig, kind: str, weights: Weights):
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
        self,
        x: mx.array,
        delta: mx.array | None,
        rotary: Table,
        context: ForwardContext,
        cache: LayerCache,
        at: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """(x, delta) -> (x, delta), each (B, T, D); the residual stream is their sum. delta None is zero.

        at: (B,) integers, one column of each row to return, as (B, 1, D); None returns all.
        """
        x, normed = self.input_layernorm.of_sum(x, delta)
        mixed = self[self.mixer_name](normed, rotary, context, cache)
        if at is not None:
            x, mixed = (mx.take_along_axis(array, at[:, None, None], axis=1) for array in (x, mixed))
        x, normed = self.post_attention_layernorm.of_sum(x, mixed)
        return x, self.mlp(normed, context.adapters)


Pace = Callable[[list[mx.array]], None]  # called with each layer's x, delta and arrays of its cache; may evaluate them


def unpaced(arrays: list[mx.array]) -> None:
    """The pace of a short pass, which MLX gets as one graph."""


def run(
    layers: Sequence[DecoderLayer],
    norm: RMSNorm,
    x: mx.array,
    rotary: Table,
    context: ForwardContext,
    caches: Sequence[LayerCache],
    at: mx.array | None = None,
    pace: Pace = unpaced,
) -> mx.array:
    """x (B, T, D) -> (B, T, D) through the layers, each with its own cache, and the final norm.

    at: (B,) integers, one column of each row to return, as (B, 1, D); the last MLP and the norm then compute only that.
    """
    return norm.of_sum(*through(layers, x, rotary, context, caches, at, pace))[1]


def through(
    layers: Sequence[DecoderLayer],
    x: mx.array,
    rotary: Table,
    context: ForwardContext,
    caches: Sequence[LayerCache],
    at: mx.array | None = None,
    pace: Pace = unpaced,
    delta: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """(x, delta) -> (x, delta) behind the layers, as of a `DecoderLayer`. The rest as for `run`."""
    for i, (layer, cache) in enumerate(zip(layers, caches, strict=True), 1):
        x, delta = layer(x, delta, rotary, context, cache, at if i == len(layers) else None)
        pace([x, delta, *cache.arrays()])
    return x, delta
