"""The vision encoder: patches -> image embeddings, in slices of bounded size."""

import math
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.budget import encoding
from mlx_qwen35.checkpoint.config import VisionConfig
from mlx_qwen35.kernels.attention import attention
from mlx_qwen35.kernels.elementwise import sigmoid
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.kernels.norm_rotary import rotate
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.model.weights import Weights

EPS = 1e-6  # of the layer norms: a constant of the architecture, as is the base of the rotary embedding
THETA = 10_000.0


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias over the last axis, computed in float32."""

    def __init__(self, weights: Weights, name: str):
        super().__init__()
        self.weight, self.bias = weights.vector(f"{name}.weight"), weights.vector(f"{name}.bias")

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight, self.bias, EPS).astype(x.dtype)  # float32 weights give float32


class Attention(nn.Module):
    """Full attention among the patches of one frame. The rows of qkv are all queries, then keys, then values."""

    def __init__(self, config: VisionConfig, weights: Weights):
        super().__init__()
        self.qkv = weights.linear("qkv")
        self.proj = weights.linear("proj")
        self.heads = config.num_heads

    def project(
        self, x: mx.array, rotary: tuple[mx.array, mx.array], adapters: ActiveAdapters | None = None
    ) -> list[mx.array]:
        """x (F, n, D) -> q and k, both rotated, and v, each (F, H, n, D / H)."""
        F, n, _ = x.shape
        q, k, v = self.qkv(x, adapters).reshape(F, n, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        return [rotate(q, rotary), rotate(k, rotary), v]

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        F, _, n, D = q.shape
        out = attention(q, k, v, D**-0.5, causal=False)
        return self.proj(out.swapaxes(1, 2).reshape(F, n, -1), adapters)


class MLP(nn.Module):
    """linear_fc2(gelu(linear_fc1(x))), with gelu's tanh form, x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3))."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.linear_fc1 = weights.linear("linear_fc1")
        self.linear_fc2 = weights.linear("linear_fc2")

    def __call__(self, inputs: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        x = self.linear_fc1(inputs, adapters).astype(mx.float32)
        x = x * sigmoid(math.sqrt(8 / math.pi) * x * (1.0 + 0.044715 * x * x))
        return self.linear_fc2(x.astype(inputs.dtype), adapters)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), over the tiles of a frame."""

    def __init__(self, config: VisionConfig, weights: Weights):
        super().__init__()
        self.norm1 = LayerNorm(weights, "norm1")
        self.attn = Attention(config, weights.at("attn"))
        self.norm2 = LayerNorm(weights, "norm2")
        self.mlp = MLP(weights.at("mlp"))

    def __call__(
        self, tiles: list[mx.array], rotary: list[tuple[mx.array, mx.array]], adapters: ActiveAdapters | None = None
    ) -> list[mx.array]:
        """tiles: (F, n, D) each, together all patches of F frames. rotary: the table of each tile.

        Evaluates tile by tile, since MLX would hold the intermediate results of all tiles.
        """
        projected = []
        for x, table in zip(tiles, rotary, strict=True):
            projected.append(self.attn.project(self.norm1(x), table, adapters))
            mx.eval(projected[-1])
        queries, keys, values = map(list, zip(*projected, strict=True))
        k, v = mx.concatenate(keys, axis=2), mx.concatenate(values, axis=2)
        del projected, keys, values
        done: list[mx.array] = []
        for x, q in zip(tiles, queries, strict=True):
            x = x + self.attn(q, k, v, adapters)
            done.append(x + self.mlp(self.norm2(x), adapters))
            mx.eval(done)
        return done


class Merger(nn.Module):
    """Each square of patches -> one token of the text model's width. Its gelu is exact, by erf."""

    def __init__(self, config: VisionConfig, weights: Weights):
        super().__init__()
        self.norm = LayerNorm(weights, "norm")
        self.linear_fc1 = weights.linear("linear_fc1")
        self.linear_fc2 = weights.linear("linear_fc2")
        self.squares = config.spatial_merge_size**2

    def __call__(self, x: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        """x (F, n, D) -> (F, n / 4, text D)"""
        F, n, _ = x.shape
        inner = self.linear_fc1(self.norm(x).reshape(F, n // self.squares, -1), adapters).astype(mx.float32)
        inner = inner * 0.5 * (1.0 + mx.erf(inner * math.sqrt(0.5)))
        return self.linear_fc2(inner.astype(x.dtype), adapters)


class VisionEncoder(nn.Module):
    """Qwen3.5's vision encoder. Its patches come in squares of merge x merge, in row-major order of the squares."""

    def __init__(self, config: VisionConfig, weights: Weights, memory_limit: int):
        """memory_limit: bytes that the model may take."""
        super().__init__()
        self.memory_limit = memory_limit
        visual = weights.at("model.visual")
        self.patch_embed = visual.linear("patch_embed.proj")
        self.pos_embed = visual.float32("pos_embed.weight")
        self.blocks = [Block(config, visual.at(f"blocks.{i}")) for i in range(config.depth)]
        self.merger = Merger(config, visual.at("merger"))
        self.config = config
        self.dtype = weights.dtype

    def encode(self, media: Media, adapters: ActiveAdapters | None = None) -> mx.array:
        """The embeddings of an image or video, (tokens, text D), evaluated. adapters: one for all rows, or None.

        Activations of a long video take no more memory than those of one slice of SLICE patches. A larger image is cut
        into tiles: only queries, keys, values and the blocks' outputs then exist for all its patches.
        """
        count = math.prod(media.grid[1:])
        encoding.check_encoding_fits(media, self.config, self.dtype, self.memory_limit)
        out = mx.zeros((media.tokens, self.config.out_hidden_size), self.dtype)
        step, at = max(1, encoding.SLICE // count), 0
        for first in range(0, media.grid[0], step):
            frames = slice(first, first + step)
            rows = (slice(start, start + encoding.SLICE) for start in range(0, count, encoding.SLICE))
            embeddings = self((mx.array(media.patches(frames, some)) for some in rows), media.grid[1:], adapters)
            embeddings = embeddings.reshape(-1, embeddings.shape[-1])
            out[at : at + len(embeddings)] = embeddings
            at += len(embeddings)
            mx.eval(out)
            mx.clear_cache()
        return out

    def __call__(
        self, tiles: Iterable[mx.array], grid: tuple[int, int], adapters: ActiveAdapters | None = None
    ) -> mx.array:
        """tiles (F, n, P), together all N patches of F frames of grid (height, width) -> (F, N / 4, text D)."""
        positions = squares_order(*grid, self.config.spatial_merge_size)
        indices, weights = table_taps(positions, grid, math.isqrt(self.config.num_position_embeddings))
        x, rotary, start = [], [], 0
        for tile in tiles:
            rows = slice(start, start + tile.shape[1])
            x.append(self._embed(tile, mx.array(indices[rows]), mx.array(weights[rows]), adapters))
            rotary.append(self._rotary(mx.array(positions[rows])))
            mx.eval(x, rotary)
            start = rows.stop
        for block in self.blocks:
            x = block(x, rotary, adapters)
        merged = []
        for tile in x:
            merged.append(self.merger(tile, adapters))
            mx.eval(merged)
        return mx.concatenate(merged, axis=1)

    def _embed(
        self, patches: mx.array, indices: mx.array, weights: mx.array, adapters: ActiveAdapters | None = None
    ) -> mx.array:
        """Patch embedding plus the position table, interpolated in float32."""
        taps = (self.pos_embed[indices[:, tap]] * weights[:, tap, None] for tap in range(4))
        position = sum(taps, mx.array(0.0))
        return self.patch_embed(patches.astype(self.dtype), adapters) + position.astype(self.dtype)

    def _rotary(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """positions (n, 2), row and column -> cos, sin (1, 1, n, head dim / 2), the row's angles first."""
        dims = self.config.hidden_size // self.config.num_heads // 2
        frequencies = mx.power(THETA, mx.arange(0, dims, 2, dtype=mx.float32) / -dims, stream=mx.cpu)
        angles = (positions[:, :, None].astype(mx.float32) * frequencies).reshape(1, 1, -1, dims)
        return mx.cos(angles), mx.sin(angles)


def squares_order(height: int, width: int, merge: int) -> np.ndarray:
    """(height * width, 2) int32: row and column of each patch, in the encoder's order."""
    rows, columns = np.indices((height, width), dtype=np.int32)
    cut = (height // merge, merge, width // merge, merge)
    return np.stack([axis.reshape(cut).swapaxes(1, 2).reshape(-1) for axis in (rows, columns)], axis=-1)


def table_taps(positions: np.ndarray, grid: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Four entries of a side x side table, (n, 4), and their weights, (n, 4) float32, for each position (n, 2).

    Bilinear, with the table's corners on the image's (transformers, get_vision_interpolation_indices_and_weights with
    align_corners).
    """
    source = positions.astype(np.float32) * (side - 1) / np.maximum(np.array(grid, np.float32) - 1, 1)
    low = np.floor(source)
    part = source - low
    near = np.clip(low.astype(np.int32), 0, side - 1)
    far = np.minimum(near + 1, side - 1)
    indices = [r * side + c for r in (near[:, 0], far[:, 0]) for c in (near[:, 1], far[:, 1])]
    shares = [r * c for r in (1 - part[:, 0], part[:, 0]) for c in (1 - part[:, 1], part[:, 1])]
    return np.stack(indices, -1), np.stack(shares, -1).astype(np.float32)
