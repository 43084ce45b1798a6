"""The training forward pass: transformers' weights, fewer and larger operations on the CPU.

Pictures all have one size, so the vision tower runs as a plain batch; the gated delta rule and its convolution are
written out. `check_forward` in train.py compares the result with transformers' own forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from checkpoint import Nano
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

CHUNK = 32  # tokens the delta rule takes at once


@dataclass
class Precision:
    """The type in which the large matrix products run; all else is float32."""

    product: torch.dtype = torch.bfloat16


PRECISION = Precision()


@dataclass
class Batch:
    """`ids` (B, T), `positions` (3, B, T), `learn` (B, T) bool, `patches` (P, 16, 1536) in order of appearance."""

    ids: Tensor
    positions: Tensor
    learn: Tensor
    patches: Tensor


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Zero-centred root-mean-square norm over the last axis."""
    return F.rms_norm(x, x.shape[-1:], weight + 1.0, eps)


def project(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """A linear layer with its product in the chosen precision; float32 in and out."""
    kind = PRECISION.product
    y = F.linear(x.to(kind), layer.weight.to(kind)).float()
    return y if layer.bias is None else y + layer.bias


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule in chunks, float32.

    `q`, `k`: (B, T, Hk, D) normalised, q scaled; `v`: (B, T, H, D); `g` (log decay) and `beta`: (B, T, H).
    Returns (B, T, H, D). T is a multiple of CHUNK. Value head h uses key head h // (H / Hk).
    """
    batch, tokens, heads, size = v.shape
    groups = heads // k.shape[2]
    n = tokens // CHUNK

    def split(x: Tensor) -> Tensor:  # (B, T, H, D) -> (B, H, n, C, D)
        return x.reshape(batch, n, CHUNK, x.shape[2], -1).permute(0, 3, 1, 2, 4)

    q, k, v = split(q), split(k), split(v)
    beta, decay = split(beta[..., None]), split(g[..., None]).cumsum(-2)  # (B, H, n, C, 1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    ratio = (decay - decay.mT).masked_fill(~lower, float("-inf")).exp()  # (B, H, n, C, C)
    scores = torch.cat((k, q), dim=-2) @ k.mT  # both (C, C) products of a key head at once
    kk, qk = (x.repeat_interleave(groups, dim=1) for x in scores.split(CHUNK, dim=-2))
    k, q = (x.repeat_interleave(groups, dim=1) for x in (k, q))
    grown = decay.exp()
    a = (beta * kk * ratio).tril(-1)
    solved = torch.linalg.solve_triangular(
        a, torch.cat((beta * v, beta * grown * k), dim=-1), upper=False, unitriangular=True
    )
    u, w = solved.split(size, dim=-1)
    qk, q = qk * ratio, q * grown
    last = decay[..., -1:, :]
    k_out, shrink = k * (last - decay).exp(), last.exp()
    state = v.new_zeros(batch, heads, size, size)
    outputs = []
    for i in range(n):
        new = u[:, :, i] - w[:, :, i] @ state
        outputs.append(q[:, :, i] @ state + qk[:, :, i] @ new)
        if i + 1 < n:
            state = shrink[:, :, i] * state + k_out[:, :, i].mT @ new
    return torch.cat(outputs, dim=2).transpose(1, 2)


def delta_net(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """One gated DeltaNet mixer on (B, T, D)."""
    batch, tokens, _ = x.shape
    p = F.pad(project(layer.in_proj_qkv, x), (0, 0, 3, 0))
    taps = layer.conv1d.weight[:, 0]
    p = F.silu(sum(p[:, j : j + tokens] * taps[:, j] for j in range(4)))
    q, k, v = p.split((layer.key_dim, layer.key_dim, layer.value_dim), dim=-1)
    q, k = (y.reshape(batch, tokens, layer.num_k_heads, layer.head_k_dim) for y in (q, k))
    # l2 norm as a root-mean-square norm: the eps of the sum is spread over the D terms of the mean
    size = layer.head_k_dim
    q = F.rms_norm(q, (size,), None, 1e-6 / size) / size
    k = F.rms_norm(k, (size,), None, 1e-6 / size) * size**-0.5
    v = v.reshape(batch, tokens, layer.num_v_heads, layer.head_v_dim)
    g = -layer.A_log.exp() * F.softplus(layer.in_proj_a(x) + layer.dt_bias)
    o = delta_rule(q, k, v, g, layer.in_proj_b(x).sigmoid())
    z = project(layer.in_proj_z, x).reshape(o.shape)
    o = F.rms_norm(o, o.shape[-1:], layer.norm.weight, layer.layer_norm_epsilon) * F.silu(z)
    return project(layer.out_proj, o.reshape(batch, tokens, -1))


def attention(layer: torch.nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """One gated attention mixer on (B, T, D), causal."""
    batch, tokens, _ = x.shape
    q, gate = project(layer.q_proj, x).view(batch, tokens, -1, 2 * layer.head_dim).chunk(2, dim=-1)
    q = rms(q, layer.q_norm.weight).transpose(1, 2)
    k = rms(project(layer.k_proj, x).view(batch, tokens, -1, layer.head_dim), layer.k_norm.weight).transpose(1, 2)
    v = project(layer.v_proj, x).view(batch, tokens, -1, layer.head_dim).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    return project(layer.o_proj, (o * gate.sigmoid()).reshape(batch, tokens, -1))


def block(layer: torch.nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """One decoder layer of either kind."""
    y = rms(x, layer.input_layernorm.weight)
    x = x + (attention(layer.self_attn, y, rotary) if hasattr(layer, "self_attn") else delta_net(layer.linear_attn, y))
    y = rms(x, layer.post_attention_layernorm.weight)
    mlp = layer.mlp
    return x + project(mlp.down_proj, F.silu(project(mlp.gate_proj, y)) * project(mlp.up_proj, y))


class VisionGrid:
    """Position tables of the one 4 x 4 patch grid: weights over the learned table, cos and sin of the rotation."""

    def __init__(self, nano: Nano):
        visual = nano.main.model.visual
        grid = torch.tensor([[1, 4, 4]])
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=2,
            kwargs={},
        )
        self.table = torch.zeros(16, visual.pos_embed.num_embeddings).scatter_add_(1, indices, weights.float())
        cos, sin = visual.rotary_pos_emb(self.table, get_vision_position_ids(grid, 2, kwargs={}))
        self.rotary = (cos.reshape(16, -1), sin.reshape(16, -1))


def see(nano: Nano, grid: VisionGrid, patches: Tensor) -> Tensor:
    """Patches (P, 16, 1536) -> picture tokens (P * 4, D)."""
    visual = nano.main.model.visual
    proj = visual.patch_embed.proj
    kind = PRECISION.product
    x = F.linear(patches.to(kind), proj.weight.flatten(1).to(kind)).float() + proj.bias
    x = x + grid.table @ visual.pos_embed.weight
    for layer in visual.blocks:
        heads = layer.attn.num_heads
        qkv = project(layer.attn.qkv, layer.norm1(x)).view(len(x), 16, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k = apply_rotary_pos_emb(qkv[0], qkv[1], grid.rotary[0][None], grid.rotary[1][None])
        o = F.scaled_dot_product_attention(q, k, qkv[2]).transpose(1, 2).flatten(2)
        x = x + project(layer.attn.proj, o)
        y = F.gelu(project(layer.mlp.linear_fc1, layer.norm2(x)), approximate="tanh")
        x = x + project(layer.mlp.linear_fc2, y)
    merger = visual.merger
    x = merger.norm(x).reshape(-1, merger.linear_fc1.in_features)
    return project(merger.linear_fc2, F.gelu(project(merger.linear_fc1, x)))


def hidden_states(nano: Nano, grid: VisionGrid, batch: Batch, picture_ids: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Hidden states after the final norm and those of the draft head, both (B, T, D)."""
    text = nano.main.model.language_model
    embedded = text.embed_tokens(batch.ids)
    if len(batch.patches):
        shown = (batch.ids == picture_ids[0]) | (batch.ids == picture_ids[1])
        embedded = embedded.masked_scatter(shown[..., None], see(nano, grid, batch.patches))
    rotary = text.rotary_emb(embedded, batch.positions)
    x = embedded
    for layer in text.layers:
        x = block(layer, x, rotary)
    x = rms(x, text.norm.weight)
    mtp = nano.mtp
    following = F.pad(embedded[:, 1:], (0, 0, 0, 1))
    both = (rms(following, mtp.pre_fc_norm_embedding.weight), rms(x, mtp.pre_fc_norm_hidden.weight))
    y = block(mtp.layers[0], project(mtp.fc, torch.cat(both, dim=-1)), rotary)
    return x, rms(y, mtp.norm.weight)
