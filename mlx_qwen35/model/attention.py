"""Gated full attention, every fourth layer."""

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache.kv_format import Columns, KVFormat
from mlx_qwen35.cache.layer import ForwardContext, KVCache
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.names import ATTENTION_INPUTS
from mlx_qwen35.kernels.elementwise import compiled, sigmoid
from mlx_qwen35.kernels.norm_rotary import queries_and_keys
from mlx_qwen35.model.rotary import Table
from mlx_qwen35.model.weights import Weights


class GatedAttention(nn.Module):
    """Grouped-query attention with normed, partly rotated queries and keys, and an output gate for each element.

    q_proj holds, for each head, its query and then its gate.
    """

    def __init__(self, config: TextConfig, weights: Weights):
        super().__init__()
        self.qkv_proj = weights.joined(*ATTENTION_INPUTS)
        self.q_norm = weights.norm("q_norm")
        self.k_norm = weights.norm("k_norm")
        self.o_proj = weights.linear("o_proj")
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim

    def __call__(self, x: mx.array, rotary: Table, context: ForwardContext, cache: KVCache) -> mx.array:
        """x (B, T, D) normed, and the rotary table of its positions -> (B, T, D). Appends to the layer's cache.

        Each row attends to its own keys, so neither neighbours nor padding can reach it.
        """
        B, T, _ = x.shape
        products = self.qkv_proj.whole(x, context.adapters)
        queries, _, v = self.qkv_proj.split(products)
        gate = queries.reshape(B, T, self.heads, -1)[..., self.head_dim :]
        v = v.reshape(B, T, -1, self.head_dim).swapaxes(1, 2)
        q, k = queries_and_keys(
            products, self.qkv_proj.split, rotary, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps,
            self.heads, v.shape[1],
        )  # fmt: skip
        seen = cache.append(k, v, context.counts)
        own = [q] if B == 1 else list(mx.split(q, B))
        rows = [self._row(*row, cache.format) for row in zip(own, seen, context.counts, strict=True)]
        out = rows[0] if B == 1 else mx.concatenate(rows)
        out = _gated(out.swapaxes(1, 2), gate)
        return self.o_proj(out.reshape(B, T, -1), context.adapters)

    def _row(self, q: mx.array, seen: Columns, n: int, kv: KVFormat) -> mx.array:
        """The first n of T queries (1, H, T, D) over the row's keys and values; 0 for the padding."""
        T = q.shape[2]
        if n == 0:
            return mx.zeros_like(q)
        out = kv.attend(q if n == T else q[:, :, :n], seen, self.head_dim**-0.5, causal=n > 1)
        return out if n == T else mx.pad(out, [(0, 0), (0, 0), (0, T - n), (0, 0)])


@compiled
def _gated(out: mx.array, gate: mx.array) -> mx.array:
    return out * sigmoid(gate)
