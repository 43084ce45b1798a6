"""The look of pictures: size, claim, small print, round ticks, and a word where matplotlib is absent."""

import sys
from decimal import Decimal
from pathlib import Path

import pytest
from PIL import Image
from refusing import refused

from mlx_qwen35.console.plot import DPI, WIDTH, check_plot, picture, round_ticks


def is_round(value: float) -> bool:
    """1, 2 or 5 times a power of ten."""
    return Decimal(repr(float(value))).normalize().as_tuple().digits in ((1,), (2,), (5,))


def draw(path: Path, most: float = 24.6, title: str = "A claim") -> list[float]:
    """A bar as long as that. Returns the ticks."""
    with picture(path, title, "what was measured", 3.0) as (_, (axes,)):
        axes.bar([0], [most])
        axes.set_ylabel("seconds")
        round_ticks(axes.yaxis)
    return list(axes.get_yticks())


@pytest.mark.parametrize("most", [24.6, 0.0037])
def test_ticks_are_multiples_of_a_round_step_from_zero(tmp_path, most):
    ticks = draw(tmp_path / "bar.png", most)
    step = round(ticks[1] - ticks[0], 12)
    assert 3 <= len(ticks) <= 7 and is_round(step)
    assert ticks == pytest.approx([step * i for i in range(len(ticks))])


def test_a_picture_has_its_size_and_corners_that_let_the_page_through(tmp_path):
    draw(tmp_path / "bar.png")
    image = Image.open(tmp_path / "bar.png")
    assert image.size == (WIDTH * DPI, 3.0 * DPI) and image.mode == "RGBA"
    assert image.getpixel((0, 0))[3] == 0 and image.getpixel((20, 200)) == (255, 255, 255, 255)


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_that_cannot_be_written_is_refused(tmp_path):
    with refused("output_unwritable"):
        draw(tmp_path / "none" / "bar.png")


def test_without_matplotlib_a_picture_is_refused_with_the_extra_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused("package_missing", "mlx-qwen35[plot]"):
        check_plot(tmp_path / "bar.png")


@pytest.mark.parametrize("place", ["", "none/bar.png"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, place):
    with refused("output_unwritable", place):
        check_plot(tmp_path / place)
