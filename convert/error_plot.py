"""The picture of a conversion's errors by layer: an SVG, written without a library, with the same bytes every time."""

import math
from collections.abc import Iterator, Mapping, Sequence

from mlx_qwen35.checkpoint.config import FULL, LINEAR

Mark = tuple[str, str, bool]  # colour, shape, whether it is filled
Series = Mapping[str, tuple[Mark, Mapping[int, float]]]  # name -> its mark, and layer -> relative error

DELTA, ATTENTION, MLP, INK, GREY, LINE = "#0072b2", "#d55e00", "#59636e", "#1f2328", "#59636e", "#d1d9e0"
CIRCLE, SQUARE, DIAMOND = "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "m-2.6-2.6h5.2v5.2h-5.2z", "m0-4l4 4l-4 4l-4-4z"
GROUPS: Mapping[str, Mark] = {  # of matrices; hollow are those that lead out of the mixer or the MLP
    "DeltaNet qkv": (DELTA, CIRCLE, True), "DeltaNet z": (DELTA, SQUARE, True), "DeltaNet a, b": (DELTA, DIAMOND, True),
    "DeltaNet out": (DELTA, CIRCLE, False), "attention q, k, v": (ATTENTION, CIRCLE, True),
    "attention o": (ATTENTION, CIRCLE, False), "MLP gate, up": (MLP, CIRCLE, True), "MLP down": (MLP, CIRCLE, False),
}  # fmt: skip
KINDS = {LINEAR: ("gated DeltaNet", (DELTA, CIRCLE, True)), FULL: ("attention", (ATTENTION, CIRCLE, True))}
WIDTH, LEFT, RIGHT = 720, 46, 560  # pixels: of the picture, and the sides of a panel's field; names stand at its right
TITLE, FIELD, PANEL = 44, 150, 244  # pixels: of a panel's title, its field, all of it


def plot(kinds: Sequence[str], groups: Mapping[str, Mapping[int, float]], stream: Sequence[float]) -> str:
    """A panel for the matrices of each layer, and one for the residual stream after it, each if it was measured.

    kinds: of the layers, as in the config. groups: of GROUPS -> layer -> relative error. stream: of each layer.
    """
    panels: dict[str, Series] = {}
    if groups:
        most = max(error for errors in groups.values() for error in errors.values())
        panels[f"Error of the matrices, % of their size: at most {100 * most:.2g} %"] = {
            name: (mark, groups[name]) for name, mark in GROUPS.items() if name in groups
        }
    if stream:
        panels[f"Error of the residual stream, % of its size: {100 * stream[-1]:.2g} % after the last layer"] = {
            name: (mark, {i: error for i, error in enumerate(stream) if kinds[i] == kind})
            for kind, (name, mark) in KINDS.items()
        }
    height = PANEL * len(panels)
    parts = [f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="#fff" stroke="{LINE}"/>']
    for number, (title, series) in enumerate(panels.items()):
        parts += _panel(PANEL * number, title, len(kinds), series)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="12">', *parts, "</svg>"]) + "\n"


def round_step(most: float) -> float:
    """Between ticks from 0 to `most`, at most six of them: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(most / 5))
    return next(step * power for step in (1, 2, 5, 10) if 5 * step * power >= most)


def _panel(top: int, title: str, layers: int, series: Series) -> Iterator[str]:
    most = 100 * max(error for _, errors in series.values() for error in errors.values()) or 1.0
    column, bottom, step = (RIGHT - LEFT) / layers, top + TITLE + FIELD, round_step(most)
    steps = math.ceil(most / step - 1e-9)
    yield _text(16, top + 24, title, "start", INK, ' font-weight="bold"')
    for number in range(steps + 1):
        y = bottom - FIELD * number / steps
        yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{LINE}"/>'
        yield _text(LEFT - 8, y + 4, f"{step * number:.10g}", "end")
    for layer in range(layers):
        if layer % -(-layers // 8) == 0:
            yield _text(LEFT + column * (layer + 0.5), bottom + 18, str(layer))
        marks = [(mark, errors[layer]) for mark, errors in series.values() if layer in errors]
        for number, (mark, error) in enumerate(marks):  # side by side
            x = LEFT + column * (layer + 0.5 + 0.7 * ((number + 0.5) / len(marks) - 0.5))
            yield _mark(x, bottom - FIELD * 100 * error / (steps * step), mark)
    yield _text((LEFT + RIGHT) / 2, bottom + 38, "layer")
    for number, (name, (mark, _)) in enumerate(series.items()):
        y = top + TITLE + 4 + 18 * number
        yield _mark(RIGHT + 22, y, mark)
        yield _text(RIGHT + 34, y + 4, name, "start", INK)


def _mark(x: float, y: float, mark: Mark) -> str:
    colour, shape, filled = mark
    return f'<path d="M{x:.1f} {y:.1f}{shape}" fill="{colour if filled else "#fff"}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = GREY, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{more}>{text}</text>'
