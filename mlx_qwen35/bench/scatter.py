"""How much the rounds of a measurement differ, and what is not measurable because they differ too much."""

from collections.abc import Mapping, Sequence
from statistics import median

MOST = 0.1  # of the median, between the slowest and the fastest round, above which the rounds scatter too much
NOT_MEASURABLE = "not measurable"


def scatter(values: Sequence[float]) -> float:
    """What lies between the least and the largest of positive figures, in medians of them."""
    return (max(values) - min(values)) / median(values)


def with_scatter(figure: str, share: float) -> str:
    """A median, and behind it how far its rounds scatter, if they do: "39.1 ~4%"."""
    return f"{figure} ~{share:.0%}" if share else figure


def warning(shares: Mapping[str, float]) -> list[str]:
    """A line where rounds scatter too much. shares: what was measured -> by how much it scatters."""
    what = max(shares, key=lambda name: shares[name])
    if shares[what] <= MOST:
        return []
    return [f"rounds scatter by {shares[what]:.0%} ({what}): close other programs or raise --repeats"]


def positive_median(values: Sequence[float]) -> float | None:
    """The median of differences, or of ratios of them; None if one is not positive: then they are not measurable."""
    return median(values) if all(value > 0 for value in values) else None


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The median of ratios round by round; None where a figure is not positive, so that a ratio says nothing."""
    if any(value <= 0 for value in (*ours, *theirs)):
        return None
    return median(us / it for us, it in zip(ours, theirs, strict=True))


def notes(table: Sequence[str], shares: Mapping[str, float], why: str) -> list[str]:
    """What stands below a table: rounds that scatter too much, and why something in it is not measurable."""
    absent = any(NOT_MEASURABLE in line for line in table)
    return [*warning(shares), *[f"{NOT_MEASURABLE}: {why}"] * absent]
