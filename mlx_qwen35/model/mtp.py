"""The multi-token prediction (MTP) head: drafts token i + 2 from token i + 1 and the hidden state of token i."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache.layer import ForwardContext, LayerCache
from mlx_qwen35.checkpoint.config import FULL, TextConfig
from mlx_qwen35.model.decoder import DecoderLayer, run
from mlx_qwen35.model.rotary import Table
from mlx_qwen35.model.weights import Weights


class MultiTokenPrediction(nn.Module):
    """fc of both normed inputs, the embedding first, then a layer of gated attention and a norm. The model's LM head
    turns its output into logits (DeepSeek-V3, arXiv:2412.19437, section 2.2; order as in vLLM's qwen3_next_mtp).

    The output may replace the hidden state to draft another token.
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
        caches: Sequence[LayerCache],
        at: mx.array | None = None,
    ) -> mx.array:
        """embeddings of tokens i + 1 and hidden states of tokens i, each (B, T, D) -> (B, T, D) for tokens i + 2.

        hidden: after the model's final norm, or this head's output. rotary, context: of tokens i. caches: one for each
        layer. at: see `decoder.run`.
        """
        both = [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(mx.concatenate(both, axis=-1), context.adapters)
        return run(self.layers, self.norm, x, rotary, context, caches, at)
