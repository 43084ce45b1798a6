"""Logits -> the processed distribution -> a token.

The noise of a sample depends on its seed and on the token's position in its sequence alone. So a seed gives the same
text alone, in a batch, and with drafts.
"""

import math
from collections.abc import Sequence

import mlx.core as mx

from mlx_qwen35.engine.presets import Sampling, check_seed


def process(logits: mx.array, sampling: Sampling, counts: mx.array | None = None, vocabulary: int = 0) -> mx.array:
    """(B, V) logits -> (B, V) float32 log-probabilities to sample from, -inf where cut off.

    In transformers' order: bias and penalties, temperature, top-k, top-p, min-p, each of the distribution before it.

    Args:
        counts: (B, V) how often each token was generated; None for no token or no penalty.
        vocabulary: the tokenizer's size. The LM head's rows beyond it are padding, never sampled; 0: there are none.
    """
    logits = penalise(logits, sampling, counts, vocabulary)
    if sampling.temp == 0:
        best = mx.argmax(logits, axis=-1, keepdims=True)
        return mx.where(mx.arange(logits.shape[-1]) == best, 0.0, -mx.inf)
    logits = logits / sampling.temp
    if not 0 < sampling.top_k < logits.shape[-1]:
        return _cut(_normalise(logits), sampling)
    ids = mx.argpartition(-logits, kth=sampling.top_k - 1, axis=-1)[..., : sampling.top_k]
    logprobs = _cut(_normalise(mx.take_along_axis(logits, ids, axis=-1)), sampling)
    return mx.put_along_axis(mx.full(logits.shape, -mx.inf), ids, logprobs, axis=-1)


def penalise(logits: mx.array, sampling: Sampling, counts: mx.array | None, vocabulary: int) -> mx.array:
    """Bias and penalties, in float32. The vocabulary's padding becomes -inf."""
    logits = logits.astype(mx.float32)
    if 0 < vocabulary < logits.shape[-1]:
        logits = mx.where(mx.arange(logits.shape[-1]) < vocabulary, logits, -mx.inf)
    if sampling.logit_bias:
        ids = mx.array(list(sampling.logit_bias))
        logits = logits.at[:, ids].add(mx.array(list(sampling.logit_bias.values()), mx.float32))
    if counts is None or not sampling.penalises:
        return logits
    generated, factor = counts > 0, sampling.repetition_penalty
    scaled = mx.where(logits < 0, logits * factor, logits / factor)
    logits = mx.where(generated, scaled, logits)
    return logits - sampling.presence_penalty * generated - sampling.frequency_penalty * counts


def _normalise(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _cut(logprobs: mx.array, sampling: Sampling) -> mx.array:
    """Top-p, then min-p, each normalised again. A row's most probable token always stays."""
    if sampling.top_p < 1:
        order = mx.argsort(logprobs, axis=-1)
        sums = mx.cumsum(mx.take_along_axis(mx.exp(logprobs), order, axis=-1), axis=-1)  # from the least probable on
        stays = (sums > 1 - sampling.top_p) | (mx.arange(order.shape[-1]) == order.shape[-1] - 1)
        stays = mx.put_along_axis(mx.zeros(order.shape, mx.bool_), order, stays, axis=-1)
        logprobs = _normalise(mx.where(stays, logprobs, -mx.inf))
    if sampling.min_p > 0:
        least = logprobs.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        logprobs = _normalise(mx.where(logprobs < least, -mx.inf, logprobs))
    return logprobs


def noise(vocabulary: int, seed: int, position: int) -> mx.array:
    """(V,) float32 standard Gumbel noise, a function of seed and position, both below 2**32."""
    return mx.random.gumbel((vocabulary,), key=mx.random.key(seed << 32 | position))


class Sampler:
    """Samples the tokens of B sequences and counts them for the penalties.

    Args:
        sampling: for all rows, or one for each.
        seeds: one for each row, 0 to 2**32 - 1.
        positions: the next token's position in each row's sequence.
        vocabulary: the tokenizer's size, see `process`.
    """

    def __init__(
        self, sampling: Sampling | Sequence[Sampling], seeds: Sequence[int], positions: Sequence[int], vocabulary: int
    ):
        self.sampling = [sampling] * len(seeds) if isinstance(sampling, Sampling) else list(sampling)
        self.vocabulary = vocabulary
        self.seeds, self.positions = [check_seed(seed) for seed in seeds], list(positions)
        self.counts: mx.array | None = None  # (B, V), if there are penalties
        self._width = 0  # of logits: V
        self._noise: dict[tuple[int, int], mx.array] = {}  # (V,) by seed and position, for the next tokens

    def sample(self, logits: mx.array) -> mx.array:
        """(B, V) -> (B,) the next tokens, committed; lazy."""
        tokens = self.peek(logits[:, None])
        self.commit(tokens)
        return tokens[:, 0]

    def peek(self, logits: mx.array, drafted: mx.array | None = None) -> mx.array:
        """(B, n, V) -> (B, n) the next tokens, not committed; lazy.

        drafted: (B, m) tokens assumed to come first. The last of the n tokens follows all of them, the one before it
        all but the last, and so on.
        """
        if all(sampling == self.sampling[0] for sampling in self.sampling):
            return self._peek(logits, drafted, slice(None))
        rows = [slice(row, row + 1) for row in range(logits.shape[0])]
        return mx.concatenate([self._peek(logits[r], None if drafted is None else drafted[r], r) for r in rows])

    def commit(self, tokens: mx.array, counts: Sequence[int] | None = None) -> None:
        """Append the first counts[i] of row i's tokens (B, n) to its sequence; None appends all."""
        B, n = tokens.shape
        committed = [n] * B if counts is None else list(counts)
        self.positions = [position + m for position, m in zip(self.positions, committed, strict=True)]
        near = {(seed, p + i) for seed, p in zip(self.seeds, self.positions, strict=True) for i in range(n)}
        self._noise = {key: noise for key, noise in self._noise.items() if key in near}
        if any(sampling.penalises for sampling in self.sampling):
            before = mx.zeros((B, self._width)) if self.counts is None else self.counts
            each = mx.ones((B, n))
            if counts is not None:
                each = (mx.arange(n) < mx.array(committed)[:, None]).astype(mx.float32)
            self.counts = before.at[mx.arange(B)[:, None], tokens].add(each)

    def _peek(self, logits: mx.array, drafted: mx.array | None, rows: slice) -> mx.array:
        """`peek` for rows of the same sampling."""
        sampling = self.sampling[rows][0]
        B, n, V = logits.shape
        self._width = V
        first = 1 - n + (0 if drafted is None else drafted.shape[1])  # drafted tokens before the first of the n
        flat, counts = logits.reshape(B * n, V), None
        if sampling.penalises and (self.counts is not None or drafted is not None):
            before = mx.zeros((B, V)) if self.counts is None else self.counts[rows]
            counts = mx.stack([_counted(before, drafted, first + i) for i in range(n)], axis=1).reshape(B * n, V)
        if sampling.temp == 0:
            return mx.argmax(penalise(flat, sampling, counts, self.vocabulary), axis=-1).reshape(B, n)
        nexts = zip(self.seeds[rows], self.positions[rows], strict=True)
        keys = [(seed, position + first + i) for seed, position in nexts for i in range(n)]
        for key in keys:  # the same array for a drafted token and for the sampled one
            if key not in self._noise:
                self._noise[key] = noise(V, *key)
        gumbel = mx.stack([self._noise[key] for key in keys])
        return mx.argmax(process(flat, sampling, counts, self.vocabulary) + gumbel, axis=-1).reshape(B, n)


def _counted(counts: mx.array, drafted: mx.array | None, m: int) -> mx.array:
    """(B, V) counts, plus the first m of the drafted tokens (B, ...)."""
    if drafted is None or m == 0:
        return counts
    return counts.at[mx.arange(len(counts))[:, None], drafted[:, :m]].add(1.0)
