"""The pictures of docs/pictures: each is drawn from its figures with a claim, units and round ticks.

Figures are measured anew, in a small way, in the full matrix.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from decimal import Decimal
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from terminal import needs_tmux

pytest.importorskip("matplotlib")

from mlx_qwen35.console.plot import DPI, WIDTH

FOLDER = Path(__file__).parents[2] / "docs/pictures"
UNITS = {  # script -> what its labels must tell
    "recipes": ("10⁻³ nats a token", "bits a weight"), "sensitivity": ("10⁻³ nats a token", "MB"),
    "memory": ("%", "GB"), "needles": ("tokens", "%"), "speed": ("tokens/s", "tokens of the prompt"),
    "answers": ("40 of 40", "all 40 right"), "losses": ("loss, nats a token", "steps"),
}  # fmt: skip
OTHERS = [name for name in UNITS if name != "recipes"]
LARGEST = 300_000  # bytes


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the folder, which finds its neighbours, without a name among the modules."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = spec_from_file_location(f"picture_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **small: object):
    """The figure of a script, from its figures as committed, or as they are measured with `small` options."""
    module, figures = script(name, monkeypatch), FOLDER / f"{name}.json"
    if small:
        return module.draw(tmp_path / f"{name}.png", module.measure(**small))
    given = [json.loads(figures.read_text(encoding="utf-8"))] if figures.exists() else []
    return module.draw(tmp_path / f"{name}.png", *given)


def texts(figure) -> list[str]:
    import matplotlib.text

    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]


def digits(value: float) -> tuple[int, ...]:
    return Decimal(f"{value:.6g}").normalize().as_tuple().digits


def rounded(ticks: list[float]) -> bool:
    """Powers of ten, or multiples of 1, 2 or 5 times one."""
    steps = {digits(after - before) for before, after in pairwise(ticks)}
    return steps in ({(1,)}, {(2,)}, {(5,)}) or {digits(tick) for tick in ticks} == {(1,)}


def check(figure, path: Path, name: str) -> None:
    with Image.open(path) as image:
        assert image.size == (WIDTH * DPI, int(figure.get_size_inches()[1] * DPI))
    claim, told = figure.get_suptitle(), texts(figure)
    assert len(claim) > 20 and any(character.isdigit() for character in claim)
    assert path.stat().st_size > 20_000 and all(any(unit in text for text in told) for unit in UNITS[name])
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    numbers = [axis for axis in axes if type(axis.get_major_locator()).__name__ in ("MaxNLocator", "LogLocator")]
    assert bool(numbers) == (name not in ("needles", "answers"))  # whose axes have names
    assert all(rounded(list(axis.get_majorticklocs())) for axis in numbers)


@pytest.mark.parametrize("name", ["recipes", *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_a_picture_has_a_claim_units_and_round_ticks(name, monkeypatch, tmp_path):
    check(drawn(name, monkeypatch, tmp_path), tmp_path / f"{name}.png", name)


SMALL = {
    "sensitivity": {"items": 1, "tasks": ("add_1", "recall")},
    "needles": {"lengths": "150", "repeats": 1}, "speed": {"geometry": "tiny", "lengths": "5,9", "rounds": 2},
    "answers": {"items": 2}, "losses": {"steps": 3, "rows": {"train": 24, "valid": 8}},
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_what_is_measured_anew_can_be_drawn(name, monkeypatch, tmp_path):
    figure = drawn(name, monkeypatch, tmp_path, **SMALL[name])
    assert len(figure.get_suptitle()) > 20 and (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_every_script_has_its_picture_and_every_picture_is_small():
    scripts = {file.stem for file in FOLDER.glob("*.py")} - {"drawing"}
    pictures = {file.stem: file for kind in ("png", "svg") for file in FOLDER.glob(f"*.{kind}")}
    assert set(pictures) == scripts and all(file.stat().st_size < LARGEST for file in pictures.values())


# --- the recording ---------------------------------------------------------------------------------------------------


def test_a_film_has_each_line_once_with_its_colours_and_a_place_in_time_for_each_frame(monkeypatch):
    film = script("recording", monkeypatch)
    first = "\x1b[32m$\x1b[0m ls"
    frames = [film.Frame(first, 1.0), film.Frame(f"{first}\n\x1b[2ma & b\n\x1b[0m\x1b[1mc", 3.0)]
    drawn = film.draw(frames, (20, 4))
    root = ElementTree.fromstring(drawn)
    lines = [group for group in root.iter("{http://www.w3.org/2000/svg}g") if group.get("id", "").startswith("l")]
    assert ["".join(line.itertext()) for line in lines] == ["$ ls", "a & b", "c"]
    looks = [line[0].attrib for line in lines]
    assert looks[0]["fill"] == "#3fb950" and looks[1]["opacity"] == ".6" and looks[2]["font-weight"] == "bold"
    assert drawn.count("<use ") == 1 + 3 and "0.00%{" in drawn and "25.00%{" in drawn and "4.00s" in drawn


@pytest.mark.full
@needs_tmux
def test_a_terminal_is_recorded(monkeypatch):
    film = script("recording", monkeypatch)

    def play(terminal):
        terminal.type("echo $((40 + 2))")
        terminal.wait("42")

    frames = film.record(play, (40, 6))
    assert "42" in frames[-1].screen and frames[-1].seconds == film.LAST
    assert all(frame.seconds <= film.LONGEST for frame in frames[:-1])
