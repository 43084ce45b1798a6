"""Gated DeltaNet, three of four layers: linear attention with a state of fixed size."""

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache import DeltaCache, Span
from mlx_qwen35.config import TextConfig
from mlx_qwen35.kernels.gated_delta import DeltaWeights, gated_delta


class GatedDeltaNet(nn.Module):
    """Four projections, the core (`kernels.gated_delta`), and the projection back."""

    def __init__(self, config: TextConfig, weights):
        super().__init__()
        self.in_proj_qkv = weights.linear("in_proj_qkv")
        self.in_proj_z = weights.linear("in_proj_z")
        self.in_proj_b = weights.linear("in_proj_b")
        self.in_proj_a = weights.linear("in_proj_a")
        self.conv1d = weights.conv("conv1d")
        self.A_log = weights.float32("A_log")
        self.dt_bias = weights.float32("dt_bias")
        self.norm = weights.float32("norm.weight")
        self.out_proj = weights.linear("out_proj")
        self.eps = config.rms_norm_eps

    def __call__(self, x: mx.array, span: Span, cache: DeltaCache) -> mx.array:
        """x (B, T, D) normed -> (B, T, D); reads and replaces the layer's memory."""
        core = DeltaWeights(self.conv1d, self.A_log, self.dt_bias, self.norm, self.eps)
        projected = (self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x))
        out, cache.memory = gated_delta(*projected, core, cache.memory, span.lengths)
        return self.out_proj(out)
