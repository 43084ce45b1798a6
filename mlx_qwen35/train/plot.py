"""The losses of a training run as a picture."""

from collections.abc import Mapping
from pathlib import Path

from mlx_qwen35.console import plot
from mlx_qwen35.train.record import Run, loss_text, mean_loss

SMOOTHED = 0.04  # of all steps, to each side
WIDE = 20.0  # highest loss over the lowest, from which on the axis is logarithmic


def draw(path: Path, run: Run, note: str) -> plot.Figure:
    """A PNG file: the training loss of each step and smoothed, validations, and the learning rate below.

    run: of at least one step. note: what was trained on what, to stand below.
    """
    steps, line = [step.step for step in run.steps], smoothed(run)
    note += "\nLosses are means over targets. The line is the mean of neighbouring steps."
    with plot.picture(path, run.claim, note, 4.5, 1, 2) as (figure, (axes, rates)):
        axes.get_gridspec().set_height_ratios((6, 1))
        each = [step.loss for step in run.steps]
        axes.plot(steps, each, "o", color=plot.SKY, alpha=0.5, markersize=3, markeredgewidth=0, label="a step")
        axes.plot(steps, line, color=plot.BLUE, linewidth=2, label="training")
        if run.validations:
            _validations(axes, run, dict(zip(steps, line, strict=True)))
        axes.set_title("\nloss, nats a token", pad=12)
        _scale(axes, line + [own.loss for own in run.validations])
        plot.name_above(axes)
        highest = max(step.learning_rate for step in run.steps)
        rates.fill_between(steps, [step.learning_rate for step in run.steps], color=plot.LINE, linewidth=0)
        rates.set_title(f"learning rate, at most {highest:.3g}", pad=3, size=8, color=plot.GREY)
        rates.set(yticks=[], ylim=(0, 1.05 * highest), xlabel="steps")
        for panel in (axes, rates):
            panel.set_xlim(0 if run.validations else 1, max(2, 1.03 * steps[-1]))
            plot.round_ticks(panel.xaxis, 8)
        axes.tick_params(labelbottom=False)
    return figure


def _validations(axes: plot.Axes, run: Run, line: Mapping[int, float]) -> None:
    """line: step -> the training's smoothed loss."""
    at, found = zip(*run.validations, strict=True)
    axes.plot(at, found, "-o", color=plot.ORANGE, linewidth=1, markersize=4, label="validation", clip_on=False)
    kept = run.kept
    if kept:
        axes.plot(*kept, "o", color=plot.PAPER, markeredgecolor=plot.ORANGE, markersize=7, clip_on=False, label="kept")
        below = kept.loss < line.get(kept.step, 0)
        plot.label(axes, loss_text(kept.loss), *kept, (0, -15 if below else 8))


def _scale(axes: plot.Axes, losses: list[float]) -> None:
    """Losses without those of single steps, which may lie far off. A wide range of them has a logarithmic axis."""
    lowest, highest = min(losses), max(losses)
    if lowest > 0 and highest > WIDE * lowest:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.5, 1.5 * highest)
        plot.decades(axes.yaxis)
    else:
        room = 0.15 * (highest - lowest) or 0.1 * highest or 1.0
        axes.set_ylim(max(0.0, lowest - room), highest + room)
        plot.round_ticks(axes.yaxis)


def smoothed(run: Run) -> list[float]:
    """The training loss around each step. At the beginning, where it falls fast, fewer steps count."""
    reaches = (min(round(SMOOTHED * len(run.steps)), i) for i in range(len(run.steps)))
    return [mean_loss(run.steps[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]
