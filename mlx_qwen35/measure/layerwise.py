"""A text model of any size with one layer in memory: all sequences pass a layer before the next one is loaded.

Only the residual streams stay in memory. Embedding and lm_head are read by rows, never whole.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_qwen35.backend import backend
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.kv_format import UNQUANTIZED, KVFormat
from mlx_qwen35.checkpoint import float16
from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.fusing import with_own_head
from mlx_qwen35.checkpoint.names import TEXT
from mlx_qwen35.checkpoint.shapes import text_shapes
from mlx_qwen35.checkpoint.tensors import Entry, as_array, open_arrays, read_bytes
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.measure.adapted import adapted
from mlx_qwen35.model.decoder import DecoderLayer
from mlx_qwen35.model.layers import Linear, RMSNorm
from mlx_qwen35.model.rotary import Rotary
from mlx_qwen35.model.weights import Weights, read_weights

Progress = Callable[[int], object]  # called with the work done since the last call
CHUNK = 512  # tokens of one pass through a layer
HEAD_ROWS = 4096  # of a slice of the head


def silent(done: int) -> None:
    """Show nothing."""


class Batch(NamedTuple):
    """Sequences of equal length that pass a layer together."""

    rows: tuple[int, ...]  # indices of the sequences
    tokens: np.ndarray  # (B, T) int32


def make_batches(tokens: Sequence[Sequence[int]], vocabulary: int) -> list[Batch]:
    """Batches of sequences of one length, up to CHUNK tokens. InputError for an empty sequence or a wrong token."""
    if not tokens or not all(len(row) for row in tokens):
        raise InputError(
            "tokens_invalid",
            f"there must be sequences, each of at least 1 token; got lengths {[len(row) for row in tokens]}",
        )
    if wrong := [token for row in tokens for token in row if not 0 <= token < vocabulary]:
        raise InputError(
            "tokens_invalid",
            f"tokens must be 0 to {vocabulary - 1}, got {wrong[0]}; the tokenizer is not the checkpoint's",
        )
    alike: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(tokens):
        alike[len(row)].append(i)
    batches = []
    for length, rows in sorted(alike.items()):
        step = max(1, CHUNK // length)
        for start in range(0, len(rows), step):
            some = tuple(rows[start : start + step])
            batches.append(Batch(some, np.array([tokens[i] for i in some], np.int32)))
    return batches


class Layerwise:
    """The text model of a checkpoint, raw or converted, quantized or not, loaded layer by layer.

    dtype: of activations and unquantized weights. alter: changes each layer's weights before the layer is built, such
    as to quantize some of them. kv: the form of keys and values. adapter: fused into the weights before that.

    Peak memory is one layer in `dtype` (0.45 GB for the 4B in float32), the residual streams, and about 0.2 GB.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        alter: Callable[[Weights], Weights] = lambda w: w,
        kv: KVFormat = UNQUANTIZED,
        adapter: Adapter | None = None,
    ):
        self.checkpoint = checkpoint = with_own_head(checkpoint, adapter)
        self.config = checkpoint.config.text
        self.dtype, self.kv, self.adapter = dtype, kv, adapter
        self.rotary = Rotary(self.config.rope)
        self._alter = alter
        self._by_numpy = backend().numpy_products and self.dtype == mx.float32
        self._names = [name for name, _ in checkpoint.part(text_shapes(self.config))]
        self.head_weights = self.config.vocab_size * self.config.hidden_size

    def embed(self, batches: Sequence[Batch]) -> list[mx.array]:
        """The input of the first layer, (B, T, D) of each batch. Only the rows of its tokens are read."""
        used = np.unique(np.concatenate([batch.tokens.ravel() for batch in batches]))
        table = self._rows("embed_tokens", used).embedding("embed_tokens")
        states = [table.look_up(mx.array(np.searchsorted(used, batch.tokens))) for batch in batches]
        mx.eval(states)
        return states

    def weights_from(self, first: int) -> int:
        """The number of weights of the layers from `first` on, a measure of the work for one token."""
        layers = tuple(f"{TEXT}layers.{i}." for i in range(first, self.config.num_hidden_layers))
        return sum(math.prod(shape) for name, shape in text_shapes(self.config).items() if name.startswith(layers))

    def layer(self, i: int) -> DecoderLayer:
        """Load layer i."""
        prefix = f"{TEXT}layers.{i}."
        names = [name for name in self._names if name.startswith(prefix)]
        layer = DecoderLayer(self.config, self.config.layer_types[i], self._read(names).at(prefix.removesuffix(".")))
        tree_map(mx.eval, layer.parameters())  # one by one: each is cast, and its source is freed
        return _through_numpy(layer) if self._by_numpy else layer

    def advance(self, i: int, states: list[mx.array], progress: Progress = silent) -> None:
        """Put the residual stream of each batch, (B, T, D), through layer i, in place.

        progress: called with the work of each part, its tokens times the layer's weights.
        """
        layer, weights = self.layer(i), self.weights_from(i) - self.weights_from(i + 1)
        own = replace(self.config, layer_types=self.config.layer_types[i : i + 1])
        for number, x in enumerate(states):
            cache = Cache(own, self.dtype, len(x), self.kv)
            cache.reserve(x.shape[1])
            step = max(1, CHUNK // len(x))
            parts = []
            for start in range(0, x.shape[1], step):
                part = x[:, start : start + step]
                with cache.forward(part.shape[1]) as context:
                    rotary = self.rotary.table(context.positions)
                    stream, delta = layer(part, None, rotary, context, cache.layers[0])
                    parts.append(stream + delta)
                mx.eval(parts[-1], cache.layers[0].arrays())
                progress(weights * part.shape[0] * part.shape[1])
            states[number] = mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
            mx.eval(states[number])
        del layer
        mx.clear_cache()

    def norm(self) -> RMSNorm:
        """The norm before lm_head."""
        return self._read([f"{TEXT}norm.weight"]).at(TEXT.removesuffix(".")).norm("norm")

    def head(self) -> Iterator[tuple[int, nn.Module]]:
        """Slices of lm_head, in order: the first token of each, and the map (..., D) -> its logits."""
        name = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        for start in range(0, self.config.vocab_size, HEAD_ROWS):
            weights = self._rows(name, np.arange(start, min(start + HEAD_ROWS, self.config.vocab_size)))
            part = weights.embedding(name) if self.config.tie_word_embeddings else weights.linear(name)
            mx.eval(part.parameters())
            yield start, _Product(part) if self._by_numpy else part
            del part, weights
            mx.clear_cache()

    def _read(self, names: list[str]) -> Weights:
        weights = read_weights(self.checkpoint, names, self.dtype)
        if self.adapter:
            weights = adapted(weights, self.adapter, lambda entry: open_arrays({"": entry})[""])
        return self._alter(weights)

    def _rows(self, name: str, rows: np.ndarray) -> Weights:
        """The weights of embed_tokens or lm_head with these rows alone, ascending."""
        prefix = "" if name == "lm_head" else TEXT
        entries = {n: self.checkpoint.entries[n] for n in self._names if n.startswith(f"{prefix}{name}.")}
        arrays = {n: read_rows(entry, rows) for n, entry in entries.items()}
        wide = [n for n, entry in entries.items() if entry.dtype in ("BF16", "F32", "F64")]
        kept = float16.unfit((n, arrays[n]) for n in wide) if self.dtype == mx.float16 else {}
        weights = Weights(arrays, self.checkpoint.quantization, self.dtype, self.config.rms_norm_eps, kept)
        if self.adapter:
            weights = adapted(weights, self.adapter, lambda entry: read_rows(entry, rows), mx.array(rows))
        return self._alter(weights.at(prefix.removesuffix(".")) if prefix else weights)


class _Product(nn.Module):
    """A linear map whose product is numpy's: on Linux its BLAS is about 20 times as fast as that of MLX's wheel."""

    def __init__(self, inner: Linear):
        super().__init__()
        self.inner = inner
        self.quantization = None  # a quantized weight is dequantized in here

    def __call__(self, x: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        weight, how = self.inner.weight, self.inner.quantization
        if how:
            weight = mx.dequantize(weight, self.inner.scales, self.inner.biases, **asdict(how)).astype(mx.float32)
        rows = np.asarray(x.reshape(-1, x.shape[-1])) @ np.asarray(weight).T
        y = mx.array(rows).reshape(*x.shape[:-1], -1)
        return y if adapters is None else adapters.add(self.inner.maps, x, y)


def _through_numpy(layer: DecoderLayer) -> DecoderLayer:
    products = tree_map(
        lambda module: _Product(module) if isinstance(module, Linear) else module,
        layer.leaf_modules(),
        is_leaf=nn.Module.is_module,
    )
    layer.update_modules(products)
    return layer


def read_rows(entry: Entry, rows: np.ndarray) -> mx.array:
    """Rows of a stored matrix, (rows, columns), float64 in float32; each run of neighbours is one read."""
    width = entry.nbytes // entry.shape[0]
    data = bytearray()
    with entry.file.open("rb") as stream:
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            data += read_bytes(entry, stream.fileno(), int(run[0]) * width, len(run) * width)
    return as_array(data, entry.dtype).reshape(len(rows), -1)
