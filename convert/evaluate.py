"""--eval: how far what was written is from its source on a text."""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.convert.progress import percent
from mlx_qwen35.load import choose_dtype
from mlx_qwen35.measure.divergence import Evaluation, divergence
from mlx_qwen35.measure.layerwise import Layerwise


def evaluate(
    source: Checkpoint,
    packed: Checkpoint,
    tokens: Sequence[Sequence[int]],
    first: Sequence[int] | None = None,
    dtype: mx.Dtype | None = None,
) -> Evaluation:
    """`divergence` of two checkpoints, with a bar. dtype: of the arithmetic of both; None is what suits the machine."""
    models = (Layerwise(checkpoint, choose_dtype(checkpoint, dtype)) for checkpoint in (source, packed))
    return divergence(*models, tokens, first, partial(percent, "evaluating"))
