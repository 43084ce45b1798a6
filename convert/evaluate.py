"""--eval: the difference between what was written and its source, on a text."""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.convert.progress import percent
from mlx_qwen35.load import choose_dtype
from mlx_qwen35.measure.divergence import Evaluation, divergence
from mlx_qwen35.measure.layerwise import Layerwise


def evaluate(
    source: Checkpoint,
    quantized: Checkpoint,
    tokens: Sequence[Sequence[int]],
    first: Sequence[int] | None = None,
    dtype: mx.Dtype | None = None,
    adapter: Adapter | None = None,
) -> Evaluation:
    """`divergence` of two checkpoints, with a bar.

    dtype: of the arithmetic of both; None: as the machine needs. adapter: fused into the source.
    """
    ours = Layerwise(source, choose_dtype(source, dtype), adapter=adapter)
    theirs = Layerwise(quantized, choose_dtype(quantized, dtype))
    return divergence(ours, theirs, tokens, first, partial(percent, "evaluating"))
