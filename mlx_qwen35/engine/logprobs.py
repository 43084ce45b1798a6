"""Log-probabilities of generated tokens, by the model itself: before bias, penalties, temperature and constraints.

They are computed on the device with the pass that gave the logits, for rows that ask, and read with its tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class TopLogprob:
    """A token that could have come. bytes: what it stands for; text: these as UTF-8, U+FFFD where they are not."""

    token: int
    text: str
    bytes: bytes
    logprob: float  # natural logarithm


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """A token that was generated. top: the most probable tokens in its place, best first, as many as were asked for."""

    top: tuple[TopLogprob, ...] = ()


class Scores(NamedTuple):
    """Of n tokens of one row, lazy."""

    logprobs: mx.array  # (n,) float32, of the tokens
    ids: mx.array  # (n, N) the most probable tokens, in any order
    tops: mx.array  # (n, N) float32, of those


class LogprobScorer:
    """Scores the tokens of a sequence that asks.

    Args:
        top: how many of the most probable tokens to tell for each.
        vocabulary: the tokenizer's size. The LM head's rows beyond it count in the sum of probabilities, as in
            transformers, and are never among the most probable.
        token_bytes: the bytes that a token stands for.
    """

    def __init__(self, top: int, vocabulary: int, token_bytes: Callable[[int], bytes]):
        self.top, self.vocabulary, self.token_bytes = top, vocabulary, token_bytes

    def score(self, logits: mx.array, tokens: mx.array) -> Scores:
        """logits (n, V), the token sampled from each (n,) -> their scores."""
        logits = logits.astype(mx.float32)
        normalizer = mx.logsumexp(logits, axis=-1, keepdims=True)
        own = mx.take_along_axis(logits, tokens[:, None], axis=-1) - normalizer
        if not self.top:
            nothing = mx.zeros((len(tokens), 0))
            return Scores(own[:, 0], nothing, nothing)
        known = logits[:, : self.vocabulary]
        ids = mx.argpartition(-known, kth=min(self.top, known.shape[-1]) - 1, axis=-1)[:, : self.top]
        return Scores(own[:, 0], ids, mx.take_along_axis(known, ids, axis=-1) - normalizer)

    def told(self, token: int, scores: Scores, place: int) -> TokenLogprob:
        """What is told of a token, the one at `place` of those scored. Waits for the pass."""
        ids, tops = np.array(scores.ids)[place].tolist(), np.array(scores.tops)[place].tolist()
        best = sorted(zip(ids, tops, strict=True), key=lambda pair: (-pair[1], pair[0]))
        top = tuple(TopLogprob(*self._said(int(other)), logprob) for other, logprob in best)
        return TokenLogprob(*self._said(token), np.array(scores.logprobs)[place].item(), top)

    def _said(self, token: int) -> tuple[int, str, bytes]:
        data = self.token_bytes(token)
        return token, data.decode("utf-8", errors="replace"), data
