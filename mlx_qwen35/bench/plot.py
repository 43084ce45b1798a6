"""The speeds as bars: medians, and how far the rounds scatter."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median

from mlx_qwen35.bench.measure import OURS, Measurement
from mlx_qwen35.bench.scatter import MOST, scatter
from mlx_qwen35.console import plot

SPEEDS = ("prefill", "decode")


def draw(path: Path, model: str, note: str, runs: Sequence[Measurement]) -> plot.Figure:
    """A PNG file: a panel for prefill and one for decode, for each prompt length a bar for each program.

    note: what was measured on what, to stand below.
    """
    note += "\nBars: medians over rounds."
    if len({run.round for run in runs}) > 1:
        note += " Lines: the slowest and the fastest round."
    if (most := _scatter(runs)) > MOST:
        note += f" They scatter by up to {most:.0%}: too much to compare closely."
    with plot.picture(path, claim(model, runs), note, 4.2, 2) as (figure, panels):
        for axes, name in zip(panels, SPEEDS, strict=True):
            _panel(axes, name, runs)
        plot.name_above(panels[0])
    return figure


def _panel(axes: plot.Axes, name: str, runs: Sequence[Measurement]) -> None:
    lengths, programs = _lengths(runs), _programs(runs)
    width, tall = 0.8 / len(programs), 0.1 * max(getattr(run, f"{name}_speed") for run in runs)  # holds its label
    for i, program in enumerate(programs):
        places = [j + width * (i - (len(programs) - 1) / 2) for j in range(len(lengths))]
        speeds = [_speeds(runs, program, prompt, name) for prompt in lengths]
        middle = [median(found) for found in speeds]
        around = [(m - min(found), max(found) - m) for m, found in zip(middle, speeds, strict=True)]
        spread = {"yerr": list(zip(*around, strict=True)), "ecolor": plot.INK}
        axes.bar(places, middle, 0.9 * width, color=plot.COLOURS[i], label=program, **spread)
        for place, value in zip(places, middle, strict=True):
            plot.label(axes, _short(value), place, 0 if value > tall else value)
    axes.set_title(f"\n{name}, tokens/s", pad=12)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens of the prompt")
    plot.round_ticks(axes.yaxis)


def _programs(runs: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(run.program for run in runs))


def _lengths(runs: Sequence[Measurement]) -> list[int]:
    return sorted({run.prompt for run in runs})


def _speeds(runs: Sequence[Measurement], program: str, prompt: int, name: str) -> list[float]:
    return [getattr(run, f"{name}_speed") for run in runs if (run.program, run.prompt) == (program, prompt)]


def _scatter(runs: Sequence[Measurement]) -> float:
    """The most that the rounds of a bar scatter."""
    return max(scatter(_speeds(runs, *bar)) for bar in product(_programs(runs), _lengths(runs), SPEEDS))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def claim(model: str, runs: Sequence[Measurement]) -> str:
    """The title: what the rounds at the longest prompt say, from the worst to the best for us.

    Rounds that scatter by more than MOST are not compared.
    """
    longest = max(run.prompt for run in runs)
    peers = [run.program for run in runs if run.program != OURS]
    ours = {name: _speeds(runs, OURS, longest, name) for name in SPEEDS}
    if not peers:
        speeds = (_short(median(ours[name])) for name in SPEEDS)
        return "{}: prefill at {} tokens/s, decoding at {}".format(model, *speeds)
    if (most := _scatter(runs)) > MOST:
        return f"Rounds scatter by {most:.0%}: measure again on a quiet machine"
    theirs = {name: _speeds(runs, peers[0], longest, name) for name in SPEEDS}
    found = ([us / it for us, it in zip(ours[name], theirs[name], strict=True)] for name in SPEEDS)
    return "{} prefills {} and decodes {} times as fast as {}".format(OURS, *map(_range, found), peers[0])


def _range(ratios: Sequence[float]) -> str:
    least, most = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return least if least == most else f"{least} to {most}"
