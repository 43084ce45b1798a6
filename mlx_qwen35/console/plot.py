"""The look of every picture: a white card that reads on light and dark pages, round ticks, colours that stay apart.

matplotlib is imported where a picture is drawn: pip install 'mlx-qwen35[plot]'.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError

Figure = Any  # matplotlib's, which may be absent
Axes = Any

# Okabe and Ito's colours, apart for every eye; the first is ours.
BLUE, ORANGE, GREEN, YELLOW, PINK, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
COLOURS = (BLUE, ORANGE, GREEN, YELLOW, PINK, SKY)
NONE_AND_ALL = ("#eef2f6", BLUE)  # of a share
INK, GREY, LINE, PAPER = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
WIDTH, MARGIN, DPI = 8.0, 0.14, 180  # inches, inches, dots an inch
STYLE: Any = {
    "font.size": 10, "text.color": INK, "axes.labelcolor": GREY, "axes.titlelocation": "left", "axes.titlesize": 10,
    "axes.facecolor": "none", "axes.axisbelow": True, "axes.edgecolor": LINE, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.major.size": 0, "ytick.major.size": 0, "grid.color": LINE, "grid.linewidth": 0.7, "legend.frameon": False,
    "errorbar.capsize": 3,
}  # fmt: skip


def check_plot(path: Path) -> None:
    """InputError where --plot could not draw into this file, to be called before anything is measured."""
    if find_spec("matplotlib") is None:
        raise InputError(
            "package_missing", "--plot needs matplotlib, which is not installed: pip install 'mlx-qwen35[plot]'"
        )
    file = path.expanduser().absolute()
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError("output_unwritable", f"--plot must name a file that can be written; {path} cannot")


@contextmanager
def picture(
    path: Path, title: str, note: str, height: float, panels: int = 1, rows: int = 1
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of so many panels a row, to draw in; then it is written to a PNG file.

    title: the claim, above. note: what was measured on what, in small print below. height: in inches; the width is
    WIDTH. The same figure gives the same bytes. InputError where the file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import FancyBboxPatch

    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=MARGIN, h_pad=MARGIN, wspace=0.03)
        figure = Figure(figsize=(WIDTH, height), facecolor="none", layout=layout)
        FigureCanvasAgg(figure)
        left: dict[str, Any] = {"x": MARGIN / WIDTH, "ha": "left"}
        figure.suptitle(title, size=12, weight="bold", **left)
        figure.supxlabel(note, size=8, color=GREY, linespacing=1.4, **left)
        figure.add_artist(
            FancyBboxPatch(
                (0.01, 0.01), WIDTH - 0.02, height - 0.02, boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=PAPER, edgecolor=LINE, zorder=-1, transform=figure.dpi_scale_trans,
            )
        )  # fmt: skip
        yield figure, list(figure.subplots(rows, panels, squeeze=False).flat)
        try:
            options: dict[str, Any] = {"metadata": {"Software": None}, "pil_kwargs": {"optimize": True}}
            figure.savefig(path.expanduser(), format="png", dpi=DPI, **options)
        except OSError as error:
            raise InputError("output_unwritable", f"{path} must be a file that can be written: {error}") from error


def round_ticks(axis: Any, most: int = 6) -> None:
    """At most so many ticks, at multiples of 1, 2 or 5 times a power of ten, with a grid."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    _numbers(axis)


def decades(axis: Any) -> None:
    """A tick at each power of ten of a logarithmic axis, with a grid."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator())
    axis.set_minor_locator(NullLocator())
    _numbers(axis)


def _numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.grid(True)


def name_above(axes: Axes) -> None:
    """The legend in one row above the panels' titles, which begin with an empty line for it."""
    from matplotlib.transforms import ScaledTranslation

    above = axes.transAxes + ScaledTranslation(0, 0.34, axes.figure.dpi_scale_trans)  # inches
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "bbox_transform": above, "borderaxespad": 0, "borderpad": 0}
    row = {"ncols": 6, "handlelength": 1, "handletextpad": 0.5, "columnspacing": 1.4}
    axes.legend(**place, **row).set_in_layout(False)  # it may be wider than its panel


def label(axes: Axes, text: str, x: float, y: float, shift: tuple[float, float] = (0, 3), **look: Any) -> None:
    """A value beside its mark: above it, or shifted by so many points."""
    paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # hides the grid
    look = {"ha": "center", "size": 8, "bbox": paper} | look
    axes.annotate(text, (x, y), shift, textcoords="offset points", **look)


def shades() -> Any:
    """Colours of a share, from none to all."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shares", NONE_AND_ALL)
