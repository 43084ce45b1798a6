"""Two models on the same questions and seeds: the difference of their scores, and its error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_qwen35.evaluate.items import Line


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent values, and its standard error: sqrt(sum((x - mean)^2) / (n - 1) / n); None for one."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


@dataclass(frozen=True)
class Paired:
    """A model against another one, question by question.

    difference: of the mean scores, positive where the model is better. standard_error: of the differences; None for
    one question. better, worse: keys of the questions that the model answered better, or worse. changed: how many they
    are.
    """

    n: int
    difference: float
    standard_error: float | None
    changed: int
    better: tuple[str, ...]
    worse: tuple[str, ...]


def paired(lines: Sequence[Line], others: Sequence[Line]) -> Paired:
    """lines, others: of the same questions in the same order, with seeds that are the same."""
    gaps = {}
    for own, other in zip(lines, others, strict=True):
        assert (own["key"], own.get("seed")) == (other["key"], other.get("seed")), "the same questions"
        gaps[own["key"]] = own["score"] - other["score"]
    difference, error = mean_and_error([*gaps.values()])
    better = tuple(key for key, gap in gaps.items() if gap > 0)
    worse = tuple(key for key, gap in gaps.items() if gap < 0)
    return Paired(len(gaps), difference, error, len(better) + len(worse), better, worse)
