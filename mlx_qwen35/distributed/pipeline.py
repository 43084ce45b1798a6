"""The pipeline split: a rank holds some of the layers, whole. The residual stream goes from rank to rank, and back.

Rank 0 has the first layers, and the table of tokens, the final norm and the head. Each rank receives before it sends,
but for rank 0, so that a ring of them cannot wait for itself.
"""

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import ForwardContext
from mlx_qwen35.distributed.group import Group
from mlx_qwen35.model.decoder import Pace, through
from mlx_qwen35.model.model import Model, Visual


class PipelineSplit:
    """A rank's part of the pipeline split, see `Split`."""

    def __init__(self, model: Model, group: Group):
        """model: of the rank's share, which has a layer at least."""
        assert model.layers, "each rank has a layer"
        self.group, self.dtype = group, model.dtype

    def run(
        self, model: Model, tokens: mx.array, visual: Visual | None, context: ForwardContext, cache: Cache,
        at: mx.array | None, pace: Pace,
    ) -> mx.array:  # fmt: skip
        """The stream is sent as one sum, which the next norm would make of its two parts first: rounded to the dtype
        of activations, also where a kernel adds. Zeros take the place of the second part, so that the norm behind it is
        the same operation as in one process, to the bit.
        """
        rank, size = self.group.rank, self.group.size
        (B, T), D, rotary = tokens.shape, model.config.hidden_size, model.rotary.table(context.positions)
        first, last = rank == 0, rank == size - 1
        x = model.embed(tokens, visual, context.adapters) if first else self._received((B, T, D), rank - 1)
        delta = None if first else mx.zeros_like(x)
        x, delta = through(model.layers, x, rotary, context, cache.layers, at if last else None, pace, delta)
        assert delta is not None
        sent = self.group.send(x + delta, (rank + 1) % size)
        mx.eval(sent)
        if not first:
            return sent
        x = self._received((B, T if at is None else 1, D), size - 1)
        return model.norm.of_sum(x, mx.zeros_like(x))[1]

    def _received(self, shape: tuple[int, ...], source: int) -> mx.array:
        return self.group.receive(shape, self.dtype, source)
