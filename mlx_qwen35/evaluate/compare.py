"""Two models on the same questions and seeds: the difference of their scores, and its error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_qwen35.evaluate.items import Line


def mean_and_error(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float | None]:
    """The mean of independent values, and its standard error: sqrt(sum((x - mean)^2) / (n - 1) / n); None for one.

    weights: of the values, 1 each by default; one at least is above 0. The error is then that of a ratio of two sums,
    sqrt(n / (n - 1) * sum((w * (x - mean))^2)) / sum(w), over the n values of a weight above 0.
    """
    weights = weights or [1.0] * len(values)
    n, total = sum(weight > 0 for weight in weights), math.fsum(weights)
    pairs = [*zip(weights, values, strict=True)]
    mean = math.fsum(weight * value for weight, value in pairs) / total
    if n < 2:
        return mean, None
    squares = math.fsum((weight * (value - mean)) ** 2 for weight, value in pairs)
    return mean, math.sqrt(squares * n / (n - 1)) / total


@dataclass(frozen=True)
class Paired:
    """A model against another one, question by question.

    difference: of the scores, the model's minus the other's. standard_error: of it, by the differences question by
    question; None for one. better, worse: keys of the questions that the model answered better, or worse. changed: how
    many they are.
    """

    n: int
    difference: float
    standard_error: float | None
    changed: int
    better: tuple[str, ...]
    worse: tuple[str, ...]


def weight(line: Line) -> float:
    """Of a line's score in its task's: 1, but for tasks that weigh texts by their length."""
    return float(line.get("weight", 1.0))


def paired(lines: Sequence[Line], others: Sequence[Line], lower: bool = False) -> Paired:
    """lines, others: of the same questions in the same order, with seeds that are the same. lower: is better."""
    gaps, weights = {}, []
    for own, other in zip(lines, others, strict=True):
        assert (own["key"], own.get("seed")) == (other["key"], other.get("seed")), "the same questions"
        weights.append(min(weight(own), weight(other)))
        gaps[own["key"]] = (own["score"] - other["score"]) * (weights[-1] > 0)
    difference, error = mean_and_error([*gaps.values()], weights)
    above = tuple(key for key, gap in gaps.items() if gap > 0)
    below = tuple(key for key, gap in gaps.items() if gap < 0)
    better, worse = (below, above) if lower else (above, below)
    return Paired(len(gaps), difference, error, len(better) + len(worse), better, worse)
