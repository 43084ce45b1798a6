"""How far a packed model is from its source on a text: perplexity, KL divergence, top-1 agreement, error by layer.

Both go through their layers side by side, one layer in memory at a time, and through slices of their heads: no logits
of a whole text are ever stored, and neither model need fit in memory.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.measure.layerwise import CHUNK, Batch, Layerwise, Progress, make_batches, silent

Bar = Callable[[int], AbstractContextManager[Progress]]


def _unseen(total: int) -> AbstractContextManager[Progress]:
    return nullcontext(silent)


@dataclass(frozen=True)
class Evaluation:
    """A packed model against its source. Means are over positions: places whose next token was predicted.

    Standard errors are those of a mean over sequences, whose positions are not independent; None for one sequence.
    """

    sequences: int
    positions: int
    source_perplexity: float
    perplexity: float
    kl: float  # nats, mean of KL(source || packed)
    kl_error: float | None  # standard error
    kl_99: float  # 99th percentile over positions
    top1: float  # share of positions where both have the same most likely token
    top1_error: float | None
    layers: tuple[float, ...]  # rms(packed - source) / rms(source) of the residual stream after each layer


def divergence(
    source: Layerwise,
    packed: Layerwise,
    tokens: Sequence[Sequence[int]],
    first: Sequence[int] | None = None,
    bar: Bar = _unseen,
) -> Evaluation:
    """Compare two forms of one model on sequences of tokens.

    first: for each sequence, the index of the first token whose prediction counts, at least 1. None means 1 for all.
    bar: opens a progress bar for the total work; what it gives is called with the work of each part.

    Raises InputError when the two models differ in config, or no token is predicted.
    """
    if source.config != packed.config:
        raise InputError(
            "models_differ",
            f"source and packed must be one model; {source.checkpoint.folder} and {packed.checkpoint.folder} differ "
            "in config",
        )
    batches = make_batches(tokens, source.config.vocab_size)
    counted = Counted(batches, tokens, first)
    models = source, packed
    streams = [model.embed(batches) for model in models]
    errors, rows = [], []
    with bar(2 * (counted.tokens * source.weights_from(0) + counted.head_work(source))) as progress:
        for i in range(source.config.num_hidden_layers):
            for model, states in zip(models, streams, strict=True):
                model.advance(i, states, progress)
            errors.append(_relative_error(*streams))
        for model, states in zip(models, streams, strict=True):
            rows.append(counted.normed(model, states))
            states.clear()
        return summary(compare(source, packed, rows[0], rows[1], counted, progress), tuple(errors))


def _relative_error(source: list[mx.array], packed: list[mx.array]) -> float:
    total = np.zeros(2)
    for a, b in zip(source, packed, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        total += np.asarray(mx.stack([mx.square(b - a).sum(), mx.square(a).sum()]))
    return float(np.sqrt(total[0] / total[1]))


# --- positions -------------------------------------------------------------------------------------------------------


class Counted:
    """The positions of all batches that count: one row each, in the order of the batches."""

    def __init__(self, batches: Sequence[Batch], tokens: Sequence[Sequence[int]], first: Sequence[int] | None = None):
        first = [1] * len(tokens) if first is None else first
        if len(first) != len(tokens) or min(first) < 1:
            raise InputError("option_invalid", f"first must be {len(tokens)} indices of at least 1, got {list(first)}")
        self.batches = batches
        # Position t predicts token t + 1.
        self.masks = [np.arange(1, b.tokens.shape[1]) >= np.array([first[i] for i in b.rows])[:, None] for b in batches]
        self.targets = np.concatenate([b.tokens[:, 1:][mask] for b, mask in zip(batches, self.masks, strict=True)])
        counts = [mask.sum(axis=1) for mask in self.masks]
        which = [i for batch in batches for i in batch.rows]
        self.sequences = np.repeat(which, np.concatenate(counts))  # which sequence each position is of
        if not len(self.targets):
            raise InputError("text_too_short", "there must be a token to predict: give sequences of at least 2 tokens")

    @property
    def tokens(self) -> int:
        return sum(batch.tokens.size for batch in self.batches)

    def head_work(self, model: Layerwise) -> int:
        return len(self.targets) * model.head_weights

    def normed(self, model: Layerwise, states: Sequence[mx.array]) -> mx.array:
        """The residual streams after the last layer -> (positions, D), what the head reads."""
        norm = model.norm()
        picked = []
        for x, mask in zip(states, self.masks, strict=True):
            flat = x[:, :-1].reshape(-1, x.shape[-1])
            picked.append(norm(flat[mx.array(np.flatnonzero(mask))]))
            mx.eval(picked[-1])
        rows = mx.concatenate(picked)
        mx.eval(rows)
        return rows


@dataclass(frozen=True)
class Positions:
    """What was found at each position; all arrays (positions,)."""

    sequences: np.ndarray  # int: which sequence it is of
    source_loss: np.ndarray  # float64, nats: of the token that came next
    loss: np.ndarray
    kl: np.ndarray
    same: np.ndarray  # bool: the most likely token of both is one


class _Side:
    """One model's logits at each position, seen a slice of the vocabulary at a time."""

    def __init__(self, count: int):
        self.highest = np.full(count, -np.inf)
        self.total = np.zeros(count)  # of exp(logit - highest)
        self.best = np.zeros(count, np.int64)
        self.target = np.zeros(count)

    def add(self, at: slice, start: int, logits: mx.array, targets: np.ndarray) -> tuple[np.ndarray, mx.array]:
        """Take in logits (rows, width) from token `start` on.

        Returns what the totals so far of these rows must be multiplied with, and exp(logits - the new highest).
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
        return self.highest + np.log(self.total)


def compare(
    source: Layerwise, packed: Layerwise, x: mx.array, y: mx.array, counted: Counted, progress: Progress = silent
) -> Positions:
    """The predictions of two models from what their heads read, x and y (positions, D).

    progress: called with the work of each slice of both heads, as in Layerwise.advance.
    """
    count = len(counted.targets)
    ours, theirs = _Side(count), _Side(count)
    gap = np.zeros(count)  # of exp(logit - highest) * (logit - the other's logit)
    for (start, head), (_, other) in zip(source.head(), packed.head(), strict=True):
        for row in range(0, count, CHUNK):
            at = slice(row, min(row + CHUNK, count))
            logits, others = _logits(head, x[at]), _logits(other, y[at])
            shrink, shares = ours.add(at, start, logits, counted.targets[at])
            theirs.add(at, start, others, counted.targets[at])
            gap[at] = gap[at] * shrink + np.asarray((shares * (logits - others)).sum(-1))
            progress(2 * logits.size * x.shape[-1])
    return Positions(
        sequences=counted.sequences,
        source_loss=ours.normalizer - ours.target,
        loss=theirs.normalizer - theirs.target,
        kl=gap / ours.total - ours.normalizer + theirs.normalizer,
        same=ours.best == theirs.best,
    )


def _logits(head: nn.Module, x: mx.array) -> mx.array:
    logits = head(x).astype(mx.float32)
    mx.eval(logits)
    return logits


def summary(found: Positions, layers: tuple[float, ...] = ()) -> Evaluation:
    """Means and their standard errors over the sequences."""
    sequences = np.unique(found.sequences)
    return Evaluation(
        sequences=len(sequences),
        positions=len(found.kl),
        source_perplexity=float(np.exp(found.source_loss.mean())),
        perplexity=float(np.exp(found.loss.mean())),
        kl=float(found.kl.mean()),
        kl_error=standard_error(found.kl, found.sequences),
        kl_99=float(np.quantile(found.kl, 0.99)),
        top1=float(found.same.mean()),
        top1_error=standard_error(found.same, found.sequences),
        layers=layers,
    )


def standard_error(values: np.ndarray, sequences: np.ndarray) -> float | None:
    """Of the mean of `values`, those of one sequence taken together (linearized ratio estimator); None for one."""
    _, of = np.unique(sequences, return_inverse=True)
    count = of.max() + 1
    if count < 2:
        return None
    rest = np.bincount(of, values - values.mean())
    return float(np.sqrt(np.square(rest).sum() * count / (count - 1)) / len(values))
