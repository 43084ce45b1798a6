"""Gated DeltaNet, three of four layers: linear attention with a state of fixed size."""

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache.layer import DeltaCache, ForwardContext
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.names import DELTA_INPUTS
from mlx_qwen35.kernels.fused_delta import delta_core
from mlx_qwen35.kernels.gated_delta import DeltaWeights
from mlx_qwen35.model.rotary import Table
from mlx_qwen35.model.weights import Weights


class GatedDeltaNet(nn.Module):
    """Four projections, the core (kernels/fused_delta.py), and the output projection."""

    def __init__(self, config: TextConfig, weights: Weights):
        super().__init__()
        self.in_proj = weights.joined(*DELTA_INPUTS)
        self.conv1d = weights.conv("conv1d")
        self.A_log = weights.float32("A_log")
        self.dt_bias = weights.float32("dt_bias")
        self.norm = weights.float32("norm.weight")
        self.out_proj = weights.linear("out_proj")
        self.eps = config.rms_norm_eps

    def __call__(self, x: mx.array, rotary: Table, context: ForwardContext, cache: DeltaCache) -> mx.array:
        """x (B, T, D) normed -> (B, T, D). Replaces the layer's state. The rotary table is not used."""
        core = DeltaWeights(self.conv1d, self.A_log, self.dt_bias, self.norm, self.eps)
        projected = self.in_proj.whole(x, context.adapters)
        out, state = delta_core(projected, self.in_proj.split, core, cache.values, context.lengths, context.stepwise)
        cache.append(state, context.stepwise)
        return self.out_proj(out, context.adapters)
