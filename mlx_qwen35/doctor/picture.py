"""--plan --plot FILE: memory plans as stacked bars up to what a model may take."""

from collections.abc import Sequence
from pathlib import Path

from mlx_qwen35.budget.parts import LABELS, parts
from mlx_qwen35.budget.plan import MemoryPlan
from mlx_qwen35.console import plot
from mlx_qwen35.doctor.advice import advised
from mlx_qwen35.doctor.plan import AS_IS, Planned

_IN_ORDER = (plot.BLUE, plot.PINK, plot.SKY, plot.GREY, plot.GREEN, plot.YELLOW, plot.ORANGE)
COLOURS = dict(zip(LABELS, _IN_ORDER, strict=True))


def draw(path: Path, title: str, note: str, plans: Sequence[tuple[str, MemoryPlan]]) -> plot.Figure:
    """A PNG file: a bar for each plan, in percent of what a model may take on its machine.

    plans: with the name of each. note: what was planned, to stand below.
    """
    found = [(plan.machine.limit, dict(parts(plan))) for _, plan in plans]
    places = range(len(plans))
    with plot.picture(path, title, note, 2.1 + 0.36 * len(plans)) as (figure, (axes,)):
        ends = [0.0] * len(plans)
        for label in (label for label in LABELS if any(own[label] for _, own in found)):
            widths = [100 * own[label] / limit for limit, own in found]
            axes.barh(places, widths, 0.62, left=ends, color=COLOURS[label], edgecolor=plot.PAPER, label=label)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for place, end, (limit, own) in zip(places, ends, found, strict=True):
            text = f"{sum(own.values()) / 1e9:.1f} of {limit / 1e9:.1f} GB"
            plot.label(axes, text, end, place, (5, 0), ha="left", va="center")
        axes.axvline(100, color=plot.INK, linewidth=1.5)
        axes.set_xlim(0, max(102, *(end + 18 for end in ends)))
        axes.set_yticks(places, [name for name, _ in plans])
        axes.set_ylim(len(plans) - 0.5, -0.5)
        axes.set_title("\n% of what the system lets a model take, which is the line", pad=8)
        plot.round_ticks(axes.xaxis)
        plot.name_above(axes)
    return figure


def draw_planned(path: Path, planned: Planned) -> plot.Figure:
    """A bar for each machine, of the form of storage that is advised here, at the first context."""
    stored = (advised(planned) or planned.row(AS_IS)).stored
    found = [planned.row(stored, machine=machine).plan for machine in planned.machines]
    fitting = sum(plan.image <= plan.machine.limit for plan in found)
    form = "" if stored == AS_IS else f" by recipe {stored}"
    image = " and an image of one megapixel" if found[0].vision_encoder else ""
    title = f"{Path(planned.name).name}{form} fits {fitting} of {len(found)} machines"
    note = f"Planned from the headers, before loading: {planned.contexts[0]:,} tokens{image}."
    return draw(path, title, note, [(plan.machine.name, plan) for plan in found])
