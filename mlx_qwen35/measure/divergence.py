"""The difference between a quantized model and its source on a text: perplexity, KL, top-1 agreement, error by layer.

Both models go through their layers side by side, one layer in memory at a time, and through slices of lm_head: the
logits of a whole text are never stored, and neither model must fit in memory.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.measure.layerwise import CHUNK, Batch, Layerwise, Progress, make_batches, silent
from mlx_qwen35.measure.predictions import Predictions

Bar = Callable[[int], AbstractContextManager[Progress]]


def _unseen(total: int) -> AbstractContextManager[Progress]:
    return nullcontext(silent)


@dataclass(frozen=True)
class Evaluation:
    """A quantized model against its source. Means are over positions, which are tokens whose next token is predicted.

    Standard errors are over sequences, whose positions are not independent; None for one sequence.
    """

    sequences: int
    positions: int
    source_perplexity: float
    perplexity: float
    kl: float  # nats, mean of KL(source || quantized)
    kl_error: float | None  # standard error
    kl_99: float  # 99th percentile over positions
    top1: float  # share of positions where both have the same most likely token
    top1_error: float | None
    layers: tuple[float, ...]  # rms(quantized - source) / rms(source) of the residual stream after each layer


def divergence(
    source: Layerwise,
    quantized: Layerwise,
    tokens: Sequence[Sequence[int]],
    first: Sequence[int] | None = None,
    bar: Bar = _unseen,
) -> Evaluation:
    """Compare two forms of one model on sequences of tokens.

    first: for each sequence, the index of the first token whose prediction counts, at least 1; None: 1 for all.
    bar: opens a progress bar for the total work, and yields a function of the work of each part.

    Raises InputError when the two models differ in config, or no token is predicted.
    """
    return summary(*divergences(source, quantized, tokens, first, bar))


def divergences(
    source: Layerwise,
    quantized: Layerwise,
    tokens: Sequence[Sequence[int]],
    first: Sequence[int] | None = None,
    bar: Bar = _unseen,
) -> tuple["Positions", tuple[float, ...]]:
    """What `divergence` is a summary of: the predictions at each position, and the error of each layer."""
    if source.config != quantized.config:
        folders = f"{source.checkpoint.folder} and {quantized.checkpoint.folder}"
        raise InputError("models_differ", f"two forms of one model have one config; those of {folders} differ")
    batches = make_batches(tokens, source.config.vocab_size)
    counted = Counted(batches, tokens, first)
    models = source, quantized
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
        return compare(source, quantized, rows[0], rows[1], counted, progress), tuple(errors)


def _relative_error(source: list[mx.array], quantized: list[mx.array]) -> float:
    total = np.zeros(2)
    for a, b in zip(source, quantized, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        total += np.asarray(mx.stack([mx.square(b - a).sum(), mx.square(a).sum()]))
    return float(np.sqrt(total[0] / total[1]))


# --- positions -------------------------------------------------------------------------------------------------------


class Counted:
    """The positions that count, of all batches in their order."""

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
        self.sequences = np.repeat(which, np.concatenate(counts))  # of each position
        if not len(self.targets):
            raise InputError("text_too_short", "there must be a token to predict: give sequences of at least 2 tokens")

    @property
    def tokens(self) -> int:
        return sum(batch.tokens.size for batch in self.batches)

    def head_work(self, model: Layerwise) -> int:
        return len(self.targets) * model.head_weights

    def normed(self, model: Layerwise, states: Sequence[mx.array]) -> mx.array:
        """The residual streams after the last layer -> (positions, D), the input of lm_head."""
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
    """The predictions at each position; all arrays (positions,)."""

    sequences: np.ndarray  # int, the index of the sequence
    source_loss: np.ndarray  # float64, nats, of the next token
    loss: np.ndarray
    kl: np.ndarray
    same: np.ndarray  # bool, whether both have the same most likely token


def compare(
    source: Layerwise, quantized: Layerwise, x: mx.array, y: mx.array, counted: Counted, progress: Progress = silent
) -> Positions:
    """The predictions of two models from the inputs of lm_head, x and y (positions, D).

    progress: called with the work of each slice, as in Layerwise.advance.
    """
    count = len(counted.targets)
    ours, theirs = Predictions(count), Predictions(count)
    gap = np.zeros(count)  # of exp(logit - highest) * (logit - the other's logit)
    for (start, head), (_, other) in zip(source.head(), quantized.head(), strict=True):
        for row in range(0, count, CHUNK):
            at = slice(row, min(row + CHUNK, count))
            logits, others = _logits(head, x[at]), _logits(other, y[at])
            shrink, shares = ours.add(at, start, logits, counted.targets[at])
            theirs.add(at, start, others, counted.targets[at])
            gap[at] = gap[at] * shrink + np.asarray((shares * (logits - others)).sum(-1))
            progress(2 * logits.size * x.shape[-1])
    return Positions(
        sequences=counted.sequences,
        source_loss=-ours.logprobs,
        loss=-theirs.logprobs,
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
    """The standard error of the mean of `values` over sequences (linearized ratio estimator); None for one sequence."""
    _, of = np.unique(sequences, return_inverse=True)
    count = of.max() + 1
    if count < 2:
        return None
    rest = np.bincount(of, values - values.mean())
    return float(np.sqrt(np.square(rest).sum() * count / (count - 1)) / len(values))
