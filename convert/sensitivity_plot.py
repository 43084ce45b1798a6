"""--sensitivity --plot FILE: what quantizing each group of matrices costs, as bars."""

from collections.abc import Sequence
from pathlib import Path

from mlx_qwen35.console import plot
from mlx_qwen35.convert.sensitivity import GroupCost

MILLI = 1e3


def draw(path: Path, model: str, note: str, costs: Sequence[GroupCost]) -> plot.Figure:
    """A PNG file: for each group a bar for each quantization, the most expensive group on top.

    costs: of `sensitivity`. note: what was measured on what, to stand below.
    """
    stored = {cost.group: cost.nbytes for cost in costs if cost.quantization is None}
    bits = list(dict.fromkeys(cost.quantization.bits for cost in costs if cost.quantization))
    found = {(cost.group, cost.quantization.bits): cost for cost in costs if cost.quantization}
    groups = sorted(stored, key=lambda group: found[group, bits[0]].kl, reverse=True)
    most = {bit: max(MILLI * found[group, bit].kl for group in groups) for bit in bits}
    title = f"{model}: {bits[0]} bit costs most in {groups[0]} ({most[bits[0]]:.2g})"
    title += "".join(f", {bit} bit at most {most[bit]:.2g}" for bit in bits[1:])
    note += "\nEach group is quantized by itself. Lines: one standard error."
    with plot.picture(path, title, note, 1.9 + 0.36 * len(groups)) as (figure, (axes,)):
        height = 0.8 / len(bits)
        for i, bit in enumerate(bits):
            places = [place + height * (i - (len(bits) - 1) / 2) for place in range(len(groups))]
            own = [found[group, bit] for group in groups]
            kl, errors = [MILLI * cost.kl for cost in own], [MILLI * (cost.kl_error or 0) for cost in own]
            axes.barh(places, kl, 0.9 * height, xerr=errors, color=plot.COLOURS[i], label=f"{bit} bit", ecolor=plot.INK)
            for place, value, error in zip(places, kl, errors, strict=True):
                plot.label(axes, f"{value:.2g}", value + error, place, (5, 0), ha="left", va="center")
        axes.set_yticks(range(len(groups)), [f"{group}, {stored[group] / 1e6:,.2f} MB" for group in groups])
        axes.invert_yaxis()
        axes.set_xlabel("KL divergence from the source, 10⁻³ nats a token")
        axes.set_xlim(0)
        plot.round_ticks(axes.xaxis)
        axes.legend(loc="lower right")
    return figure
