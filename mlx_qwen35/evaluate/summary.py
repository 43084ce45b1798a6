"""What a task has come to: an entry of DIR/summary.json, and a summary as text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_qwen35.console.progress import duration
from mlx_qwen35.console.table import align
from mlx_qwen35.evaluate.compare import mean_and_error, weight
from mlx_qwen35.evaluate.items import Line
from mlx_qwen35.evaluate.labels import names
from mlx_qwen35.evaluate.task import TOO_LONG, Published
from mlx_qwen35.machine.versions import versions


@dataclass(frozen=True)
class Outcome:
    """What a task came to on one model.

    n: questions. score: 0 to 1, the mean; standard_error: of it, None for one question. cut_at_limit: answers that the
    most tokens ended. too_long: questions that the context has no room for, which were not asked, and count as wrong.
    tokens: generated ones; prompt_tokens, image_tokens: read ones. seconds: of all processes. versions: of the task,
    and of what asked it, by name. settings: of the answers. more: further figures, by name.
    """

    n: int
    score: float
    standard_error: float | None
    cut_at_limit: int
    too_long: int
    tokens: int
    prompt_tokens: int
    image_tokens: int
    seconds: float
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    published: Published | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def outcome(
    lines: Sequence[Line],
    seconds: float,
    version: str,
    settings: Mapping[str, Any],
    published: Published | None = None,
) -> Outcome:
    """Of a task's lines, each with its score."""
    score, error = mean_and_error([line["score"] for line in lines], [weight(line) for line in lines])
    too_long = sum(line.get("finish_reason") == TOO_LONG for line in lines)

    def total(name: str) -> int:
        return sum(line.get(name, 0) for line in lines)

    return Outcome(
        len(lines), score, error, total("cut_at_limit"), too_long, total("tokens"), total("prompt_tokens"),
        total("image_tokens"), round(seconds, 3), versions() | {"task": version}, settings, published,
    )  # fmt: skip


def entry(found: Outcome) -> dict[str, Any]:
    """An outcome as JSON has it."""
    told = asdict(found)
    return told.pop("more") | told


# --- as text ---------------------------------------------------------------------------------------------------------


def described(summary: Mapping[str, Any]) -> str:
    """A summary in a few lines: scores with one standard error, in percent, as tables have them."""
    tasks: Mapping[str, Mapping[str, Any]] = summary["tasks"]
    _, against = names(summary)
    lines = []
    for name, own in tasks.items():
        if "kl" in own:
            lines += [
                f"{name}: KL divergence from {against} "
                f"{with_error(own['kl'], own['kl_error'], '.5f')} nats, "
                f"same most likely token {100 * own['top1']:.2f} %, on {own['positions']:,} tokens of "
                f"{own['text']}"
            ]
    if scored := {name: own for name, own in tasks.items() if "score" in own}:
        rows: list[Sequence[str]] = [("task", "questions", "score", "cut", "tokens", "time", "published, %")]
        for name, own in scored.items():
            rows.append(_row(name, own))
            if other := own.get("against"):
                rows.append(_row(f"  {against}", other))
        lines += align(rows)
    for name, own in scored.items():
        lines += _paired(name, own, against) if "paired" in own else []
        lines += lower_text(name, own)
        for who, entry in ((name, own), (f"{name}, {against}", own.get("against"))):
            lines += _cut(who, entry) + too_long_text(who, entry) if entry else []
    lines += certain_text(scored.values())
    return "\n".join(lines)


def _row(name: str, own: Mapping[str, Any]) -> Sequence[str]:
    published = own["published"]
    return (
        name, f"{own['n']:,}", score_text(own), f"{own['cut_at_limit']:,}",
        f"{own['tokens']:,}", duration(own["seconds"]), f"{100 * published['score']:.1f}" if published else "",
    )  # fmt: skip


def score_text(own: Mapping[str, Any]) -> str:
    """A task's score with its standard error, in percent, or in a unit of its own."""
    if unit := own.get("unit"):
        return f"{with_error(own['score'], own['standard_error'], '.4g')} {_words(unit)}"
    return f"{percent(own['score'], own['standard_error'])} %"


def difference_text(own: Mapping[str, Any]) -> str:
    """A task's paired difference with its standard error, the model's score minus the other's: in points, or in the
    unit of the score.
    """
    difference, error = own["paired"]["difference"], own["paired"]["standard_error"]
    if unit := own.get("unit"):
        return f"{with_error(difference, error, '+.4g')} {_words(unit)}"
    return f"{percent(difference, error, '+.1f')} points"


def lower_text(name: str, own: Mapping[str, Any]) -> list[str]:
    """Says of a task with a unit that less is better."""
    return [f"{name}: lower is better, in {_words(own['unit'])}"] if "unit" in own else []


def certain_text(tasks: Iterable[Mapping[str, Any]]) -> list[str]:
    """What an error of 0 means, where a score or a difference has one."""
    own = [part for task in tasks for part in (task, task.get("against"), task.get("paired")) if part]
    if all(part["standard_error"] != 0 for part in own):
        return []
    return [
        "An error of 0 is no certainty: of n answers that are all alike, up to 3 in n may be others elsewhere (95 %)."
    ]


def too_long_text(name: str, own: Mapping[str, Any]) -> list[str]:
    """Says how many questions were not asked."""
    if not own["too_long"]:
        return []
    then = "are no part of the score" if "unit" in own else "count as wrong"
    return [
        f"{name}: {own['too_long']:,} of {own['n']:,} questions did not fit into the model's context. They were not "
        f"asked, and {then}"
    ]


def _words(unit: str) -> str:
    return unit.replace("_", " ")


def _cut(name: str, own: Mapping[str, Any]) -> list[str]:
    if not own["cut_at_limit"]:
        return []
    most = own["settings"].get("max_tokens")
    return [
        f"{name}: {own['cut_at_limit']:,} of {own['n']:,} answers were cut at {most} tokens, and count as they stand. "
        "Give more by --max-tokens, in another folder"
    ]


def percent(share: float, error: float | None, digits: str = ".1f") -> str:
    """A share and its standard error, in percent."""
    return with_error(100 * share, None if error is None else 100 * error, digits)


def with_error(value: float, error: float | None, digits: str) -> str:
    """A figure ± its standard error. digits: a format, as ".1f"."""
    return f"{value:{digits}}" + ("" if error is None else f" ± {error:{digits.removeprefix('+')}}")


def _paired(name: str, own: Mapping[str, Any], against: str) -> list[str]:
    paired = own["paired"]
    return [
        f"{name}: {difference_text(own)} against {against} on the same questions and seeds; "
        + (f"{len(paired['better']):,} better, {len(paired['worse']):,} worse" if paired["changed"] else "none changed")
    ]
