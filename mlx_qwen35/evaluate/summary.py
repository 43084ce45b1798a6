"""What a run has come to: DIR/summary.json, and the same as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_qwen35.evaluate.compare import mean_and_error
from mlx_qwen35.evaluate.items import Line
from mlx_qwen35.evaluate.task import Published


@dataclass(frozen=True)
class Outcome:
    """What a task came to on one model.

    n: questions. score: 0 to 1, the mean; standard_error: of it, None for one question. cut_at_limit: answers that the
    most tokens ended. tokens: generated ones; prompt_tokens, image_tokens: read ones. seconds: of all processes.
    settings: of the answers. metric: what a score is.
    """

    n: int
    score: float
    standard_error: float | None
    cut_at_limit: int
    tokens: int
    prompt_tokens: int
    image_tokens: int
    seconds: float
    version: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    published: Published | None = None
    metric: str = "right"
    details: Mapping[str, Any] = field(default_factory=dict)  # more figures of the task, by name


def outcome(
    lines: Sequence[Line],
    seconds: float,
    version: str,
    settings: Mapping[str, Any],
    published: Published | None = None,
) -> Outcome:
    """Of a task's lines, each with its score."""
    score, error = mean_and_error([line["score"] for line in lines])

    def total(name: str) -> int:
        return sum(line.get(name, 0) for line in lines)

    return Outcome(
        len(lines), score, error, total("cut_at_limit"), total("tokens"), total("prompt_tokens"),
        total("image_tokens"), round(seconds, 3), version, settings, published,
    )  # fmt: skip
