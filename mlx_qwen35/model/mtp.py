"""The multi-token-prediction head: from a hidden state and the token that followed it, a guess at the one after."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache.layer import ForwardContext, KVCache
from mlx_qwen35.checkpoint.config import FULL, TextConfig
from mlx_qwen35.model.decoder import DecoderLayer, run
from mlx_qwen35.model.rotary import Table
from mlx_qwen35.model.weights import Weights


class MultiTokenPrediction(nn.Module):
    """fc of both normed inputs, the embedding first, then a layer of gated attention and a norm; the model's own head
    makes logits of what comes out (DeepSeek-V3, arXiv:2412.19437, section 2.2; order as in vLLM's qwen3_next_mtp).

    Its output may take the place of the hidden state for another guess.
    """

    def __init__(self, config: TextConfig, weights: Weights):
        super().__init__()
        self.pre_fc_norm_embedding = weights.norm("pre_fc_norm_embedding")
        self.pre_fc_norm_hidden = weights.norm("pre_fc_norm_hidden")
        self.fc = weights.linear("fc")
        self.layers = [
            DecoderLayer(config, FULL, weights.at(f"layers.{i}")) for i in range(config.mtp_num_hidden_layers)
        ]
        self.norm = weights.norm("norm")

    def __call__(
        self,
        embeddings: mx.array,
        hidden: mx.array,
        rotary: Table,
        context: ForwardContext,
        caches: Sequence[KVCache],
        at: mx.array | None = None,
    ) -> mx.array:
        """embeddings of the tokens i + 1 and the model's hidden states i, each (B, T, D) -> (B, T, D) for tokens i + 2.

        hidden: after the model's final norm, or what this head gave. rotary, context: of the tokens i. caches: of each
        of its layers. at: (B,), the only column of each row that is wanted; then (B, 1, D).
        """
        both = [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)]
        return run(self.layers, self.norm, self.fc(mx.concatenate(both, axis=-1)), rotary, context, caches, at)


class DraftHead:
    """The head of a loaded model: read from disk when it is wanted, and given back by `release`.

    `fault` is why it cannot be used.
    """

    def __init__(self, load: Callable[[], MultiTokenPrediction], nbytes: int, fault: str | None = None):
        self._load = load
        self._weights: MultiTokenPrediction | None = None
        self.nbytes = nbytes  # in memory, once it is there
        self.fault = fault

    @property
    def loaded(self) -> bool:
        return self._weights is not None

    @property
    def weights(self) -> MultiTokenPrediction:
        self._weights = self._weights or self._load()
        return self._weights

    def release(self) -> None:
        """Give its memory back; it is read again when it is wanted."""
        if self._weights is not None:
            self._weights = None
            mx.clear_cache()
