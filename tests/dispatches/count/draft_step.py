"""The graph of a step of our decoding, with drafts or without, in parts. For worker.py, which prepares MLX.

It is the pass of a running row, greedy, on Metal: what feeds tokens, looks at them and settles the pass before the next
one, after a pass whose drafts were all accepted, so that the head has as many pairs to read as it ever has. The parts
begin at markers; what lies between two of them, by what it is made of, belongs to the first.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_qwen35.engine import rows as engine_rows
from mlx_qwen35.engine.drafts import speculate
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.drafts.speculate import DraftPolicy
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.rows import Rows
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.model.lazy import LazyPart
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.mtp import MultiTokenPrediction
from mlx_qwen35.prompt.prompt import Prompt

from . import markers
from .dispatch_rule import BOUNDARY

READ = 3  # tokens in the cache before

HEAD, DRAFT_LOGITS, SAMPLING, ROWS, SETTLING, LOGITS = (
    "head", "logits of drafts", "sampling", "rows of the model", "settling", "logits of rows"
)  # fmt: skip


def parts(depth: int) -> list[str]:
    """What begins at each marker of a step with so many drafts. A drafted token begins what the head makes of it."""
    return [HEAD, DRAFT_LOGITS, SAMPLING, HEAD] * depth + [ROWS, SETTLING, LOGITS, SAMPLING, SAMPLING]


def begin(array: mx.array) -> mx.array:
    return markers.marked(BOUNDARY, array, array)


def _around(function: Callable) -> Callable:
    """The function, with a part that begins at its first argument, and one that begins at what it gives."""
    return lambda x, *args, **options: begin(function(begin(x), *args, **options))


def _marked(function: Callable) -> Callable:
    """The function, with a part that begins at what it gives."""
    return lambda *args, **options: begin(function(*args, **options))


class _Head:
    """The draft head with a part that begins at the hidden states which it is given."""

    def __init__(self, head: MultiTokenPrediction):
        self.head = head

    def __call__(self, embeddings: mx.array, hidden: mx.array, *args: Any) -> mx.array:
        return self.head(embeddings, begin(hidden), *args)


def record_step(model: Model, head: MultiTokenPrediction, depth: int, forget: Callable[[Any], None]) -> dict[str, Any]:
    """markers.record of a step with `depth` drafts. forget(cache): puts zeros in the place of a cache's arrays."""
    mx.async_eval = lambda *arrays: None  # nothing can be computed while a graph is recorded
    model.mtp = LazyPart(lambda: _Head(head))
    rows, sampler = Rows(model), Sampler(Sampling(temp=0), 0, READ, 0)
    sequence = Sequence(
        Prompt((0,) * READ, thinking=False), sampler, 1 << 20, prefill_step_size=READ, drafts=DraftPolicy(depth, True)
    )
    sequence.own = cache = model.make_cache()

    def prompt(tokens: mx.array) -> list[mx.array]:
        hidden = model.hidden(tokens, cache)
        if depth:
            cache.follower = DraftFollower(model, [0])
            cache.follower.prefill(model, tokens, hidden, [READ], [0])
        return [hidden, *markers.arrays(cache)]

    def state() -> list[Any]:
        return [rows.cache, rows.speculation.follower]

    def step(tokens: mx.array) -> list[mx.array]:
        rows.current = done = rows._feed(tokens, depth)
        done.tokens, done.begun = [[0] * (1 + depth)], [len(sequence.tokens)]
        sequence.tokens += done.tokens[0]
        rows.settle()
        return [done.sampled, done.finite, *markers.arrays(state())]

    markers.record(prompt, mx.zeros((1, READ), mx.int32))
    forget(cache)
    rows.join([sequence])
    model.hidden, model.logits = _around(model.hidden), _around(model.logits)
    engine_rows.peek, speculate.peek = _marked(engine_rows.peek), _marked(speculate.peek)
    markers.record(step, mx.zeros((1, 1), mx.int32))
    forget(state())
    return markers.record(step, mx.zeros((1, 1), mx.int32))
