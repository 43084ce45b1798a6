"""How often the draft head's guesses are accepted: answers with an account of each step, and texts that are given.

`answer` decodes as generate does and remembers how many tokens each step drafted and accepted. For `acceptance` the
model and the head read each text. The head guesses token j from the tokens before j - 1, the hidden state of token
j - 2 and the embedding of token j - 1. Three rules decide whether the guess is accepted:

greedy     the most probable token of both is the same
coupled    what is used here: both are drawn with the noise of (seed, position), and are equal
classical  rejection sampling (arXiv:2211.17192) accepts a draft of distribution q for a target p with probability
           sum over tokens of min(p, q), which no rule that keeps p can exceed
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.engine.distribution import process
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, RowDrafts
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler, noise
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.model.model import Model, Visual
from mlx_qwen35.prompt.prompt import Prompt

PREFILL = 1024  # prompt tokens of a chunk
ROWS = 32  # of logits at a time
GREEDY = Sampling(temp=0)


# --- answers ---------------------------------------------------------------------------------------------------------


class Account(RowDrafts):
    """Drafts of one answer, with an account of each step: how many tokens were drafted, how many accepted."""

    def __init__(self, policy: DraftPolicy):
        super().__init__(policy)
        self.rounds: list[tuple[int, int]] = []

    def count(self, depth: int, drafted: int, accepted: int) -> None:
        super().count(depth, drafted, accepted)
        self.rounds.append((drafted, accepted))


class Answer(NamedTuple):
    """The tokens of one answer, and how many each step behind the prompt drafted and accepted."""

    tokens: tuple[int, ...]
    rounds: tuple[tuple[int, int], ...]


def answer(
    model: Model,
    prompt: Prompt,
    depth: int,
    limit: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    vocabulary: int = 0,
) -> Answer:
    """Answer one prompt as generate does, with `depth` drafts a step and at most `limit` tokens."""
    engine, sampler = Engine(model), Sampler(sampling, seed, len(prompt.tokens), vocabulary)
    request = Request(prompt, sampler, limit, prefill_step_size=PREFILL, stop_ids=stop_ids)
    request.drafts = account = Account(DraftPolicy(depth, fixed=True))
    engine.add(request)
    while not engine.idle:
        engine.step()
    if request.error:
        raise request.error
    return Answer(tuple(request.tokens), tuple(account.rounds) if depth else ((0, 0),) * (len(request.tokens) - 1))


def shares(rounds: Sequence[tuple[int, int]], depth: int) -> list[float | None]:
    """p_1 to p_depth: of the drafts j whose predecessors were accepted, how many were; None where there were none."""
    found: list[float | None] = []
    for j in range(depth):
        asked = [accepted > j for drafted, accepted in rounds if drafted > j and accepted >= j]
        found.append(sum(asked) / len(asked) if asked else None)
    return found


# --- texts -----------------------------------------------------------------------------------------------------------


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


def guesses(model: Model, text: Text, before_norm: bool = False) -> tuple[mx.array, mx.array]:
    """The hidden states (N, D) of model and head, whose logits are their guesses at tokens[first:].

    before_norm: the head gets the model's hidden state before the final norm, not the one after it.
    """
    tokens = mx.array([list(text.tokens)])
    T, first = tokens.shape[1], max(2, text.first)
    x = embeddings = model.embed(tokens, text.visual)
    cache, head = model.make_cache(), DraftFollower(model, [0]).cache
    with cache.forward(T, None, text.positions) as context:
        rotary, delta = model.rotary.table(context.positions), None
        for layer, state in zip(model.layers, cache.layers, strict=True):
            x, delta = layer(x, delta, rotary, context, state)
    x, hidden = model.norm.of_sum(x, delta)
    given = x if before_norm else hidden
    where = None if text.positions is None else text.positions[..., :-1]
    with head.forward(T - 1, None, where) as context:
        rotary = model.rotary.table(context.positions)
        drafted = model.mtp.part(embeddings[:, 1:], given[:, :-1], rotary, context, head.layers)
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

    vocabulary: the tokenizer's size, see distribution.process. before_norm: see guesses.
    """
    found, total = np.zeros(3), 0
    for text in texts:
        hidden, drafted = guesses(model, text, before_norm)
        for start in range(0, len(hidden), ROWS):
            here = slice(start, start + ROWS)
            p, q = (
                process(model.logits(x[here]), Sampling(temp=temp), vocabulary=vocabulary) for x in (hidden, drafted)
            )
            found += accepted(p, q, seeds, max(2, text.first) + start)
        total += len(hidden)
    return Acceptance(total, *map(float, found / max(1, total)))


def accepted(p: mx.array, q: mx.array, seeds: Sequence[int], place: int) -> tuple[float, float, float]:
    """Of the rows of two log-probabilities (N, V) how many each rule accepts: greedy, coupled, classical.

    place: the position of the first row's token, on which the noise depends.
    """
    return _same(p, q), coupled(p, q, seeds, place), mx.minimum(mx.exp(p), mx.exp(q)).sum().item()


def _same(p: mx.array, q: mx.array) -> int:
    return (mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)).sum().item()


def coupled(p: mx.array, q: mx.array, seeds: Sequence[int], place: int) -> float:
    """How many rows of the log-probabilities (N, V) draw the same token of both, a mean over the seeds."""
    N, V = p.shape
    equal = 0
    for seed in seeds:
        gumbel = mx.stack([noise(V, seed, place + i) for i in range(N)])
        equal += _same(p + gumbel, q + gumbel)
    return equal / len(seeds)
