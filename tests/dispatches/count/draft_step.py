"""The graph of a step of our decoding, with drafts or without, in parts. For worker.py, which prepares MLX.

It is the loop's own step, greedy, on Metal: what feeds tokens, looks at them and settles the step before the next one,
after a step whose drafts were all accepted, so that the head has as many pairs to read as it ever has. The parts begin
at markers; what lies between two of them, by what it is made of, belongs to the first.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, Speculation
from mlx_qwen35.engine.loop import _Loop, _Rows
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.mtp import DraftHead, MultiTokenPrediction

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


class _Marked(Sampler):
    def peek(self, logits: mx.array, drafted: mx.array | None = None) -> mx.array:
        return begin(super().peek(logits, drafted))


class _Head:
    """The draft head with a part that begins at the hidden states which it is given."""

    def __init__(self, head: MultiTokenPrediction):
        self.head = head

    def __call__(self, embeddings: mx.array, hidden: mx.array, *args: Any) -> mx.array:
        return self.head(embeddings, begin(hidden), *args)


def record_step(model: Model, head: MultiTokenPrediction, depth: int, forget: Callable[[Any], None]) -> dict[str, Any]:
    """markers.record of a step with `depth` drafts. forget(cache): puts zeros in the place of a cache's arrays."""
    mx.async_eval = lambda *arrays: None  # nothing can be computed while a graph is recorded
    model.mtp = DraftHead(lambda: _Head(head), 0)
    cache = model.make_cache()
    loops: list[_Loop] = []

    def prompt(tokens: mx.array) -> list[mx.array]:
        hidden = model.hidden(tokens, cache)
        if depth:
            cache.follower = DraftFollower(model, [0])
            cache.follower.prefill(model, tokens, hidden, [READ], [0])
        return [hidden, *markers.arrays(cache)]

    def step(tokens: mx.array) -> list[mx.array]:
        loop = loops[0]
        done = loop._feed(tokens, depth)
        loop.rows.taken = [1 + depth]
        loop._settle(done, [[0] * (1 + depth)], False)
        return [done.sampled, done.finite, *markers.arrays(cache)]

    markers.record(prompt, mx.zeros((1, READ), mx.int32))
    forget(cache)
    speculation = Speculation(model, cache, DraftPolicy(depth, fixed=True)) if depth else None
    model.hidden, model.logits = _around(model.hidden), _around(model.logits)
    rows = _Rows([1 << 20], (), lambda row: False)
    loops.append(_Loop(model, cache, _Marked(Sampling(temp=0), [0], [READ], 0), rows, speculation))
    markers.record(step, mx.zeros((1, 1), mx.int32))
    forget(cache)
    return markers.record(step, mx.zeros((1, 1), mx.int32))
