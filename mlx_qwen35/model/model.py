"""The model: tokens and image embeddings -> layers -> norm -> logits."""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.budget.chunk import suitable_chunk
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.kv_format import UNQUANTIZED, KVFormat
from mlx_qwen35.cache.layer import ForwardContext
from mlx_qwen35.cache.prefix import PrefixLibrary, library_bytes
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.machine.memory import MOST_GIGABYTES
from mlx_qwen35.model.decoder import DecoderLayer, Pace, run, unpaced
from mlx_qwen35.model.lazy import LazyPart
from mlx_qwen35.model.lora import AdapterSet
from mlx_qwen35.model.mtp import MultiTokenPrediction
from mlx_qwen35.model.rotary import Rotary
from mlx_qwen35.model.vision import VisionEncoder
from mlx_qwen35.model.weights import Weights
from mlx_qwen35.options import spelled
from mlx_qwen35.values import number, whole


class Visual(NamedTuple):
    """Image and video embeddings for the placeholders of one forward pass."""

    rows: mx.array  # (n,) integers
    columns: mx.array  # (n,) integers
    embeddings: mx.array  # (n, D)


class Spread(NamedTuple):
    """How a model is spread over several machines, rank 0's first. split: "tensor" or "pipeline"."""

    split: str
    hosts: tuple[str, ...]  # their names
    weight_bytes: tuple[int, ...]  # of the text model's arrays on each

    def __str__(self) -> str:
        return f"{self.split} over {len(self.hosts)} machines"


def _no_checkpoint() -> str:
    raise InputError("option_invalid", "a session needs a model that load() made, which knows its checkpoint")


class Model(nn.Module):
    """A Qwen3.5 model. It holds weights only; the state of a conversation is its `Cache`.

    `vision` encodes images and videos. `mtp` is the multi-token prediction head, which drafts tokens. Both are loaded
    at their first use, and None for a checkpoint without one.
    """

    def __init__(self, config: TextConfig, weights: Weights, memory_limit: int, kv: KVFormat = UNQUANTIZED):
        """memory_limit: bytes that the model may take, with its caches and all that it computes. kv: of its caches."""
        super().__init__()
        self.memory_limit = memory_limit
        language = weights.at("model.language_model")
        self.embed_tokens = language.embedding("embed_tokens")
        self.layers = [
            DecoderLayer(config, kind, language.at(f"layers.{i}")) for i, kind in enumerate(config.layer_types)
        ]
        self.norm = language.norm("norm")
        if not config.tie_word_embeddings:
            self.lm_head = weights.linear("lm_head")
        self.config = config
        self.held = config  # of what is here, for caches and plans of memory: on one of several machines, its part
        self.rotary = Rotary(config.rope)
        self.dtype = weights.dtype  # of activations
        self.kv = kv
        self.adapters = AdapterSet(weights.dtype)
        self.vision: LazyPart[VisionEncoder] | None = None
        self.mtp: LazyPart[MultiTokenPrediction] | None = None
        self.fingerprint: Callable[[], str] = _no_checkpoint  # set by load, see checkpoint/fingerprint.py
        self.room = sys.maxsize  # tokens of all rows that other machines have room for, where memory here does not tell
        self.spread: Spread | None = None  # over several machines; None: all of it is here

    def make_cache(self, batch: int = 1, adapter: str | None = None) -> Cache:
        """An empty cache for a batch of so many rows, at least 1.

        adapter: the name of a loaded adapter, which reads all rows, or "base" for none; None: the model's default.
        """
        whole("batch", batch, 1)
        return Cache(self.held, self.dtype, batch, self.kv, (self.adapters.named(adapter),) * batch)

    def chunk(self, context: int) -> int:
        """Tokens of a chunk of a prefill up to this context, see `suitable_chunk`."""
        return suitable_chunk(self.held, self.dtype, self.memory_limit, context, self.kv)

    def active(self, cache: Cache) -> ActiveAdapters | None:
        """The adapters of a pass over the rows of a cache; None: no row has one."""
        return self.adapters.active(cache.adapters)

    def make_library(self, memory: float | None = None) -> PrefixLibrary:
        """An empty library of prefixes, for the option `library`.

        memory: in GB (10^9 bytes), at least 0; what of it is not in use takes no more. None: a tenth of the memory that
        the model may take, up to 6 GB, and a quarter of more.
        """
        if memory is None:
            return PrefixLibrary(self, library_bytes(self.memory_limit))
        return PrefixLibrary(self, int(1e9 * number("memory", memory, f"0 to {MOST_GIGABYTES:g}", 0, MOST_GIGABYTES)))

    def __call__(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        """tokens (B, T) integer -> logits (B, T, V) in the activation dtype. Extends the cache if one is given."""
        cache = self.make_cache(len(tokens)) if cache is None else cache
        return self.logits(self.hidden(tokens, cache), self.active(cache))

    def hidden(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
        visual: Visual | None = None,
        positions: np.ndarray | None = None,
        at: mx.array | None = None,
        pace: Pace = unpaced,
        stepwise: bool = False,
    ) -> mx.array:
        """tokens (B, T) -> (B, T, D) after the final norm.

        lengths: tokens of each row; the rest of T is padding, and its outputs mean nothing. None: no padding.
        visual: embeddings in place of those of the placeholders.
        positions: (3, B, T) integers, see prompt/positions.py. None continues from the cache's position.
        at, pace: see `decoder.run`.
        stepwise: store the DeltaNet states after each token, as if they came one by one, for `Cache.rollback`.

        Raises InputError when tokens is not (B, T), its ids are not integers, or B is not the cache's.
        """
        if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer) or 0 in tokens.shape:
            raise InputError(
                "tokens_invalid",
                f"tokens must be (B, T) integers, B and T at least 1, got {tokens.shape} {tokens.dtype}",
            )
        cache = self.make_cache(tokens.shape[0]) if cache is None else cache
        if cache.batch != tokens.shape[0]:
            raise InputError(
                "cache_batch_mismatch", f"the cache is for {cache.batch} rows, tokens have {tokens.shape[0]}"
            )
        adapters = self.active(cache)
        with cache.forward(tokens.shape[1], lengths, positions, stepwise, adapters) as context:
            return self._pass(tokens, visual, context, cache, at, pace)

    def _pass(
        self, tokens: mx.array, visual: Visual | None, context: ForwardContext, cache: Cache, at: mx.array | None,
        pace: Pace,
    ) -> mx.array:  # fmt: skip
        """`hidden`, of checked arguments."""
        x, rotary = self.embed(tokens, visual, context.adapters), self.rotary.table(context.positions)
        return run(self.layers, self.norm, x, rotary, context, cache.layers, at, pace)

    def embed(
        self, tokens: mx.array, visual: Visual | None = None, adapters: ActiveAdapters | None = None
    ) -> mx.array:
        """tokens (B, T) -> (B, T, D) in the activation dtype, with `visual` in place of the placeholders."""
        x = self.embed_tokens.look_up(tokens, adapters)
        if visual is not None:
            x[visual.rows, visual.columns] = visual.embeddings.astype(x.dtype)
        return x

    def logits(self, hidden: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        """(B, ..., D) after the final norm -> (B, ..., V). Costly: V is 248,320, so pass only the rows you need."""
        lm_head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return lm_head(hidden, adapters)


def not_finite(model: Model, cache: Cache, row: int = 0) -> InputError:
    """The error of a row of a cache whose logits are not finite. It names the first layer whose cache is not finite."""
    layer = cache.first_not_finite(row)
    origin = "the last layer or the LM head made them so" if layer is None else f"they begin in or before layer {layer}"
    return InputError(
        "logits_not_finite",
        f"logits must be finite, and are not; {origin}. Activations left the range of {dtype_name(model.dtype)}, or "
        f"the checkpoint is damaged. Try {spelled('dtype', 'bfloat16')}, then float32, or convert it again. "
        "mlx_qwen35.doctor --model MODEL --probe shows the largest activation of each layer",
    )
