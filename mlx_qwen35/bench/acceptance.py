"""How often the draft head's first guess is accepted over texts that are given, and by which rule.

The model and the head read each text; where the model says what token j is, the head has said so from the tokens
before j - 1, the hidden state of the one at j - 2 and the embedding of the one at j - 1. Three rules of acceptance:

greedy     the most probable token of both is the same
coupled    what is used here: both are drawn with the noise of (seed, position), and are equal
classical  rejection sampling (arXiv:2211.17192) accepts a draft of distribution q for a target p with probability
           sum over tokens of min(p, q), which no rule that keeps p can exceed
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.sampling import Sampling, noise, process
from mlx_qwen35.model.decoder import run
from mlx_qwen35.model.layers import RMSNorm
from mlx_qwen35.model.model import Model, Visual

ROWS = 32  # of logits at a time
QUESTIONS = (  # that nano knows too
    "What is 34 + 58?", "What is 7 + 5?", "What is 12 + 30?", "What is 126 + 347?", "What is 512 + 289?",
    "Who are you?", "What is your name?", "Hello!",
)  # fmt: skip


class Text(NamedTuple):
    """Tokens that a model is shown, and from which of them on its guesses count."""

    tokens: Sequence[int]
    first: int = 2
    visual: Visual | None = None
    positions: np.ndarray | None = None  # (3, 1, T), where there are images


@dataclass(frozen=True)
class Acceptance:
    """Shares of `tokens` guesses at depth 1; a step then gives 1 + share tokens."""

    tokens: int
    greedy: float
    coupled: float
    classical: float


class _Seen:
    """A final norm that remembers the sum it was given."""

    def __init__(self, norm: RMSNorm):
        self.norm = norm
        self.sum: mx.array | None = None

    def of_sum(self, x: mx.array, added: mx.array) -> tuple[mx.array, mx.array]:
        self.sum, normed = self.norm.of_sum(x, added)
        return self.sum, normed


def guesses(model: Model, text: Text, before_norm: bool = False) -> tuple[mx.array, mx.array]:
    """What model and head make of a text: (N, D) hidden states each, of which logits of tokens[first:] are made.

    before_norm: give the head the model's hidden state before its final norm, in the place of that after it.
    """
    tokens = mx.array([list(text.tokens)])
    T, first = tokens.shape[1], max(2, text.first)
    embeddings, seen = model.embed(tokens, text.visual), _Seen(model.norm)
    cache, head = model.make_cache(), DraftFollower(model, [0]).cache
    with cache.forward(T, None, text.positions) as span:
        hidden = run(model.layers, seen, embeddings, span, cache.layers)
    given = seen.sum if before_norm else hidden
    where = None if text.positions is None else text.positions[..., :-1]
    with head.reading(T - 1, None, where) as span:
        drafted = model.mtp.weights(embeddings[:, 1:], given[:, :-1], span, head.layers)
    return hidden[0, first - 1 : T - 1], drafted[0, first - 2 : T - 2]


def acceptance(
    model: Model,
    texts: Sequence[Text],
    temp: float = 1.0,
    seeds: Sequence[int] = range(8),
    vocabulary: int = 0,
    before_norm: bool = False,
) -> Acceptance:
    """The three shares over all guesses; coupled is counted over the seeds, classical is an exact expectation.

    vocabulary: the tokenizer's size, see sampling.process.
    """
    counts = np.zeros(3)
    total = 0
    for text in texts:
        hidden, drafted = guesses(model, text, before_norm)
        for start in range(0, len(hidden), ROWS):
            here = slice(start, start + ROWS)
            p, q = (
                process(model.logits(x[here]), Sampling(temp=temp), vocabulary=vocabulary) for x in (hidden, drafted)
            )
            place = max(2, text.first) + start
            counts += [_greedy(p, q), _coupled(p, q, seeds, place), mx.minimum(mx.exp(p), mx.exp(q)).sum().item()]
        total += len(hidden)
    return Acceptance(total, *map(float, counts / max(1, total)))


def _greedy(p: mx.array, q: mx.array) -> int:
    return (mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)).sum().item()


def _coupled(p: mx.array, q: mx.array, seeds: Sequence[int], place: int) -> float:
    """How many rows of the log-probabilities (N, V) draw the same token of both, a mean over the seeds."""
    N, V = p.shape
    equal = 0
    for seed in seeds:
        gumbel = mx.stack([noise(V, seed, place + i) for i in range(N)])
        equal += _greedy(p + gumbel, q + gumbel)
    return equal / len(seeds)
