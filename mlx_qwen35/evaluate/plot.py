"""Scores as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.console import plot
from mlx_qwen35.evaluate.labels import names

APART = 0.16  # of a row, between its middle and each of two models
ROOM = 10  # percent that a label needs


def drawable(summary: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The tasks whose score is a share."""
    return {name: own for name, own in summary["tasks"].items() if "score" in own and "unit" not in own}


def draw(path: Path, summary: Mapping[str, Any]) -> plot.Figure:
    """A PNG file: a row for each task with its score, standard error and published figure; of two models, if so many.

    summary: with one task at least that is `drawable`.
    """
    tasks = drawable(summary)
    note = f"{', '.join(f'{name} {version}' for name, version in summary['versions'].items())}; {summary['machine']}."
    note += "\nLines: one standard error over the questions."
    if any(own["published"] for own in tasks.values()):
        note += " Published figures are self-reported."
    with plot.picture(path, claim(summary), note, 1.9 + 0.55 * len(tasks)) as (figure, (axes,)):
        series = [tasks]
        if others := {name: own["against"] for name, own in tasks.items() if "against" in own}:
            series.append(others)
        for place, entries in enumerate(series):
            shift = APART * (2 * place - 1) if len(series) > 1 else 0.0
            _model(axes, names(summary)[place], [*tasks], entries, shift, plot.COLOURS[place])
        _published(axes, tasks)
        axes.set_title("\nscore, %", pad=12)
        told = [f"{name}\n{own['n']:,} question{'s' * (own['n'] != 1)}" for name, own in tasks.items()]
        axes.set_yticks(range(len(tasks)), told)
        axes.set(ylim=(len(tasks) - 0.5, -0.5), xlim=(0, 104))
        plot.round_ticks(axes.xaxis)
        plot.name_above(axes)
    return figure


def _model(
    axes: plot.Axes, name: str, tasks: list[str], entries: Mapping[str, Mapping[str, Any]], shift: float, colour: str
) -> None:
    rows = [row + shift for row, task in enumerate(tasks) if task in entries]
    scores = [100 * entries[task]["score"] for task in tasks if task in entries]
    errors = [100 * (entries[task]["standard_error"] or 0.0) for task in tasks if task in entries]
    axes.errorbar(scores, rows, xerr=errors, fmt="o", color=colour, markersize=6, elinewidth=1.5, label=name)
    for row, score, error in zip(rows, scores, errors, strict=True):  # beside its line, inwards
        low = score - error < ROOM
        plot.label(axes, f"{score:.1f}", score + error if low else score - error, row, (7 if low else -7, -3),
                   ha="left" if low else "right")


def _published(axes: plot.Axes, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    found = {row: own["published"]["score"] for row, own in enumerate(tasks.values()) if own["published"]}
    if found:
        scores = [100 * score for score in found.values()]
        axes.plot(scores, [*found], "|", color=plot.INK, markersize=15, markeredgewidth=2, label="published")


def claim(summary: Mapping[str, Any]) -> str:
    """The title: the score of one task, or how far two models are apart."""
    tasks = drawable(summary)
    model, against = names(summary)
    gaps = [100 * own["paired"]["difference"] for own in tasks.values() if "paired" in own]
    if gaps:
        where = f" on {len(gaps)} tasks" if len(gaps) > 1 else ""
        ends = dict.fromkeys(f"{gap:+.1f}" for gap in (min(gaps), max(gaps)))
        return f"{model}: {' to '.join(ends)} points against {against}{where}"
    if len(tasks) == 1:
        (name, own), = tasks.items()
        return f"{model}: {100 * own['score']:.1f} % of {name}"
    return f"{model} on {len(tasks)} tasks"
