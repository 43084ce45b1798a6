"""The tensor split: every rank holds a part of each layer, and of the table of tokens.

A map behind the heads or the MLP (out_proj, o_proj, down_proj) has a part of its inputs here, so its outputs are summed
over the ranks. Everything between is by heads or rows, and each rank's own. So a pass has a sum for the embeddings, and
two for a layer.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import ForwardContext
from mlx_qwen35.distributed.group import Group
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.model.decoder import Pace, run
from mlx_qwen35.model.layers import Linear
from mlx_qwen35.model.model import Model, Visual

_SUMMED = {"linear_attn": "out_proj", "self_attn": "o_proj", "mlp": "down_proj"}  # in each part of a layer


class Summed(nn.Module):
    """A linear map whose inputs are divided over the ranks: its outputs, with what adapters add, summed.

    They are summed in the dtype of activations, to which each product is rounded. Of two ranks float32 gives the same
    bits. Of four it would spare two roundings, for twice the bytes of each sum: logits of a random model in bfloat16
    are 3.0 % off alone (of their deviation), 4.0 % on four ranks, 3.7 % with sums in float32.
    """

    def __init__(self, linear: Linear, group: Group):
        super().__init__()
        self.linear, self.group = linear, group

    def __call__(self, x: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        return self.group.all_sum(self.linear(x, adapters))


class TensorSplit:
    """A rank's part of the tensor split, see `Split`."""

    def __init__(self, model: Model, group: Group, vocabulary: int):
        """model: of the rank's share; the sums are put into its layers. vocabulary: rows of the whole table. Each rank
        has a block of one size, but the last, which has the rest.
        """
        self.group, self.vocabulary = group, vocabulary
        self.block = -(-vocabulary // group.size)
        self.first = group.rank * self.block
        for layer in model.layers:
            for part, name in _SUMMED.items():
                if part in layer:
                    layer[part][name] = Summed(layer[part][name], group)

    def embed(
        self, model: Model, tokens: mx.array, visual: Visual | None, adapters: ActiveAdapters | None
    ) -> mx.array:  # fmt: skip
        """As `Model.embed`: each row from the rank that has it, and zeros from the others, which change no bit."""
        rows = len(model.embed_tokens.weight)
        if not rows:
            x = mx.zeros((*tokens.shape, model.config.hidden_size), model.dtype)
        else:
            own = tokens.astype(mx.int32) - self.first
            here = (own >= 0) & (own < rows)
            x = model.embed_tokens.look_up(mx.where(here, own, 0), adapters)
            x = mx.where(here[..., None], x, 0)
        if visual is not None:
            x[visual.rows, visual.columns] = visual.embeddings.astype(x.dtype)
        return self.group.all_sum(x)

    def run(
        self, model: Model, tokens: mx.array, visual: Visual | None, context: ForwardContext, cache: Cache,
        at: mx.array | None, pace: Pace,
    ) -> mx.array:  # fmt: skip
        x, rotary = self.embed(model, tokens, visual, context.adapters), model.rotary.table(context.positions)
        return run(model.layers, model.norm, x, rotary, context, cache.layers, at, pace)

    def logits(self, model: Model, hidden: mx.array, adapters: ActiveAdapters | None) -> mx.array:
        """As `Model.logits`: each rank's rows of the head, in blocks of one size."""
        own = Model.logits(model, hidden, adapters)
        if short := self.block - own.shape[-1]:
            own = mx.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, short)])
        blocks = mx.moveaxis(self.group.all_gather(own), 0, -2)
        return blocks.flatten(-2)[..., : self.vocabulary]
