"""What a model predicts at each position of a text, without its logits: those of a whole text would be gigabytes."""

import mlx.core as mx
import numpy as np


class Predictions:
    """The predictions of `count` known tokens, from slices of logits: some positions, and some tokens, at a time.

    Sums over the vocabulary are float32 within a slice, float64 over slices.
    """

    def __init__(self, count: int):
        self.highest = np.full(count, -np.inf)
        self.total = np.zeros(count)  # of exp(logit - highest)
        self.best = np.zeros(count, np.int64)  # the most probable token
        self.target = np.zeros(count)  # the logit of the known one

    def add(self, at: slice, start: int, logits: mx.array, targets: np.ndarray) -> tuple[np.ndarray, mx.array]:
        """Add float32 logits (n, width) of the n positions `at`, of the tokens from `start` on.

        targets: (n,) the known tokens of these positions.

        Returns the factor by which earlier totals of these positions shrink, and exp(logits - the new highest).
        """
        width = logits.shape[-1]
        own, best = np.asarray(logits.max(-1)).astype(np.float64), np.asarray(logits.argmax(-1))
        highest = np.maximum(self.highest[at], own)
        self.best[at] = np.where(own > self.highest[at], start + best.astype(np.int64), self.best[at])
        shrink = np.exp(self.highest[at] - highest)
        shares = mx.exp(logits - mx.array(highest.astype(np.float32))[:, None])
        self.total[at] = self.total[at] * shrink + np.asarray(shares.sum(-1))
        self.highest[at] = highest
        inside = (targets >= start) & (targets < start + width)
        index = mx.array(np.clip(targets - start, 0, width - 1))[:, None]
        found = np.asarray(mx.take_along_axis(logits, index, axis=-1))[:, 0]
        self.target[at] = np.where(inside, found, self.target[at])
        return shrink, shares

    @property
    def normalizer(self) -> np.ndarray:
        """(count,) float64, the logarithm of the sum of exp(logit)."""
        return self.highest + np.log(self.total)

    @property
    def logprobs(self) -> np.ndarray:
        """(count,) float64, of the known tokens, natural logarithms."""
        return self.target - self.normalizer
