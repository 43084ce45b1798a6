"""DIR/report.md and DIR/scores.png: what was asked of which models, how, and what came of it."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.folder import write_whole
from mlx_qwen35.console.progress import duration
from mlx_qwen35.console.report import quoted
from mlx_qwen35.console.table import markdown
from mlx_qwen35.evaluate import plot
from mlx_qwen35.evaluate.items import Line
from mlx_qwen35.evaluate.labels import names
from mlx_qwen35.evaluate.summary import (
    certain_text,
    difference_text,
    lower_text,
    percent,
    score_text,
    too_long_text,
    with_error,
)

REPORT, PICTURE = "report.md", "scores.png"
CUT = 0.02  # share of answers that the most tokens ended, from which on a score is not the model's
CHANGED = 20  # questions that are shown of those that two models answered otherwise
SHOWN = 100  # characters of their answers

Entries = Mapping[str, Mapping[str, Any]]  # tasks of a summary, by name


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    lines: Mapping[str, Sequence[Line]],
    others: Mapping[str, Sequence[Line]],
) -> None:
    """Write both into the folder. lines, others: by task, of the model and of the one that it is compared with.

    There is no picture where matplotlib is not installed, or nothing was scored.
    """
    drawn = bool(plot.drawable(summary)) and find_spec("matplotlib") is not None
    if drawn:
        plot.draw(folder / PICTURE, summary)
    write_whole(folder / REPORT, report(summary, lines, others, folder.resolve().name, drawn))


def scored(summary: Mapping[str, Any]) -> Entries:
    """The tasks that have a score."""
    return {name: own for name, own in summary["tasks"].items() if "score" in own}


def report(
    summary: Mapping[str, Any],
    lines: Mapping[str, Sequence[Line]],
    others: Mapping[str, Sequence[Line]],
    name: str,
    drawn: bool,
) -> str:
    """The report's text. name: of the folder. drawn: whether the picture is."""
    tasks, (model, against) = scored(summary), names(summary)
    picture = f"![Scores]({PICTURE})" if drawn else ""
    if plot.drawable(summary) and not drawn:
        picture = "The picture of the scores needs matplotlib: `pip install 'mlx-qwen35[plot]'`."
    sections = [
        f"# {name}: an evaluation of {model}",
        f"Made with {_named(summary['versions'])}, on {summary['machine']}.",
        picture,
        _scores(tasks, model, against),
        _distance({name: own for name, own in summary["tasks"].items() if "kl" in own}, against),
        _paired(tasks, model, against, lines, others),
        _settings(summary),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if name != "task")


# --- sections --------------------------------------------------------------------------------------------------------


def _scores(tasks: Entries, model: str, against: str) -> str:
    if not tasks:
        return ""
    pictures = any(own["image_tokens"] for own in tasks.values())
    header = ["task", *(["model"] if against else []), "questions", "score", "cut", "tokens read",
              *(["of images"] if pictures else []), "written", "time", "published, %"]  # fmt: skip
    rows, remarks = [], []
    for name, own in tasks.items():
        for who, entry in [(model, own), (against, own.get("against"))]:
            if entry:
                rows.append([name, *([who] if against else []), *_row(entry, pictures)])
                whose = f"{name}, {who}" if against else name
                remarks += _cut(whose, entry) + [f"**{text}.**" for text in too_long_text(whose, entry)]
        remarks += [f"{text}." for text in lower_text(name, own)]
    told = ["Scores are ± one standard error over the questions. Cut: answers that the most tokens ended."]
    if pictures:
        told.append(
            "Answers about images were judged by rules. Published scores of sets of images, whose answers a language "
            "model reads, are some points higher."
        )
    told += certain_text(tasks.values())
    published = {name: own["published"] for name, own in tasks.items() if own["published"]}
    sources = [
        f"- {name}, {100 * own['score']:.1f} %: {own['source']}{'; ' if own['note'] else ''}{own['note']}"
        for name, own in published.items()
    ]
    parts = ["## Scores", markdown(header, rows), " ".join(told), *remarks]
    return "\n\n".join([*parts, *(["Published:\n\n" + "\n".join(sources)] if sources else [])])


def _row(own: Mapping[str, Any], pictures: bool) -> list[str]:
    published = own["published"]
    return [
        f"{own['n']:,}", score_text(own), f"{own['cut_at_limit']:,}",
        f"{own['prompt_tokens']:,}", *([f"{own['image_tokens']:,}"] if pictures else []), f"{own['tokens']:,}",
        duration(own["seconds"]), f"{100 * published['score']:.1f}" if published else "",
    ]  # fmt: skip


def _cut(name: str, own: Mapping[str, Any]) -> list[str]:
    share, most = own["cut_at_limit"] / own["n"], own["settings"].get("max_tokens")
    if share <= CUT:
        return []
    return [
        f"**{name}: {own['cut_at_limit']:,} of {own['n']:,} answers ({100 * share:.0f} %) were cut at {most} tokens**, "
        "and count as they stand. The score is not the model's: give more by `--max-tokens`, in another folder."
    ]


def _distance(tasks: Entries, against: str) -> str:
    rows = [
        [with_error(own["kl"], own["kl_error"], ".5f"), percent(own["top1"], own["top1_error"], ".2f"),
         f"{own['positions']:,}", own["text"], duration(own["seconds"])]
        for own in tasks.values()
    ]  # fmt: skip
    if not rows:
        return ""
    header = ["KL divergence, nats", "same most likely token, %", "tokens", "of", "time"]
    return f"## Distance from {against}\n\n{markdown(header, rows)}"


def _paired(
    tasks: Entries,
    model: str,
    against: str,
    lines: Mapping[str, Sequence[Line]],
    others: Mapping[str, Sequence[Line]],
) -> str:
    pairs = {name: own["paired"] for name, own in tasks.items() if "paired" in own}
    if not pairs:
        return ""
    rows = [
        [name, f"{own['n']:,}", difference_text(tasks[name]),
         f"{len(own['better']):,}", f"{len(own['worse']):,}", f"{100 * own['changed'] / own['n']:.1f}"]
        for name, own in pairs.items()
    ]  # fmt: skip
    parts = [
        f"## Against {against}",
        f"The same questions and seeds: the score of {model} minus that of {against}. The error is that of the "
        "differences, question by question.",
        markdown(["task", "questions", "difference", "better", "worse", "changed, %"], rows),
    ]
    for name, own in pairs.items():
        changed = [*own["worse"], *own["better"]]
        if changed:
            parts += [f"### {name}: what changed", _changed(changed, lines[name], others[name], against)]
        if len(changed) > CHANGED:
            parts.append(f"{len(changed) - CHANGED:,} more: see `summary.json`.")
    return "\n\n".join(parts)


def _changed(keys: Sequence[str], lines: Sequence[Line], others: Sequence[Line], against: str) -> str:
    pairs = {own["key"]: (own, other) for own, other in zip(lines, others, strict=True)}
    texts = any("expected" in line for line in lines)  # and not likelihoods of whole texts
    rows = []
    for key in keys[:CHANGED]:
        said = [_cell(pairs[key][0].get("expected", "")), *(_cell(line["answer"]) for line in pairs[key])]
        rows.append([key, *(f"{line['score']:.2f}" for line in pairs[key]), *(said if texts else [])])
    header = ["question", "score", f"of {against}"]
    return markdown([*header, *(["expected", "answer", f"of {against}"] if texts else [])], rows)


def _cell(text: str) -> str:
    return quoted(text, SHOWN).replace("|", "\\|")


def _settings(summary: Mapping[str, Any]) -> str:
    loaded = [dict(own) for own in summary["loaded"].values() if own]
    told = [f"- {own.pop('name')}: {_told(own)}" for own in loaded]
    tasks: Entries = summary["tasks"]
    told += [f"- {name} ({own['versions']['task']}): {_told(own['settings'])}" for name, own in tasks.items()]
    return "## Settings\n\n" + "\n".join(told)


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
