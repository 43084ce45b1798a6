"""The picture of errors by layer: every error at its height, kinds of layers and matrices told apart, round ticks."""

import re
import xml.etree.ElementTree as ElementTree
from decimal import Decimal

import pytest

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import FULL, LINEAR
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.card import PLOT, Facts, write_card
from mlx_qwen35.convert.error_plot import ATTENTION, DELTA, FIELD, GROUPS, LEFT, RIGHT, TITLE, plot, round_step
from mlx_qwen35.convert.verify import Difference

KINDS = [LINEAR, LINEAR, LINEAR, FULL]
GROUP_ERRORS = {"DeltaNet qkv": {0: 0.05, 1: 0.1, 2: 0.1}, "attention q, k, v": {3: 0.08}, "MLP down": {3: 0.0}}


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).findall("{*}text")]


def marks(picture: str) -> list[tuple[str, float, float]]:
    """Colour, x and y of the marks inside the fields, which have their names at the right."""
    found = re.findall(r'<path d="M([\d.]+) ([\d.]+)m[^"]+" fill="[^"]+" stroke="(#\w+)"', picture)
    return [(colour, float(x), float(y)) for x, y, colour in found if float(x) < RIGHT]


def test_errors_stand_at_their_height_in_the_column_of_their_layer():
    drawn = marks(plot(KINDS, GROUP_ERRORS, ()))
    width, bottom = (RIGHT - LEFT) / 4, TITLE + FIELD
    assert sorted(int((x - LEFT) / width) for _, x, _ in drawn) == [0, 1, 2, 3, 3]
    assert [y for colour, _, y in drawn if colour == DELTA] == [bottom - FIELD / 2, TITLE, TITLE]  # of 10 %
    assert [y for colour, _, y in drawn if colour == ATTENTION] == pytest.approx([bottom - 0.8 * FIELD])


def test_layers_of_the_residual_stream_have_the_colour_of_their_kind():
    drawn = marks(plot(KINDS, {}, [0.01, 0.02, 0.04, 0.08]))
    assert [colour for colour, _, _ in drawn] == [DELTA] * 3 + [ATTENTION]
    assert [x for _, x, _ in drawn] == pytest.approx([LEFT + (RIGHT - LEFT) / 4 * (i + 0.5) for i in range(4)], abs=0.1)


def test_titles_tell_the_largest_and_the_last_error_and_names_stand_beside():
    told = texts(plot(KINDS, GROUP_ERRORS, [0.2, 0.3, 0.1, 0.155]))
    assert any(text.endswith("at most 10 %") for text in told)
    assert any(text.endswith(": 16 % after the last layer") for text in told)
    assert {*GROUP_ERRORS, "gated DeltaNet", "attention"} <= set(told)


@pytest.mark.parametrize("most", [24.6, 18.5, 10.0, 8.5, 0.52, 1e-7])
def test_ticks_are_round_and_few(most):
    step = round_step(most)
    assert Decimal(f"{step:.6g}").normalize().as_tuple().digits in ((1,), (2,), (5,)) and 2 < most / step <= 5.001


def test_every_group_has_a_mark_of_its_own():
    assert len(set(GROUPS.values())) == len(GROUPS)


@pytest.mark.parametrize("errors", [{"DeltaNet out": {0: 0.0}}, {"DeltaNet out": {0: 0.5}}])
def test_one_layer_and_no_error_can_be_drawn(errors):
    assert len(marks(plot([LINEAR], errors, ()))) == 1


def test_a_group_is_as_far_off_as_its_matrices_together(raw, tmp_path):
    folder = convert(raw, tmp_path / "out", quantize=True)
    prefix = "model.language_model.layers.0.linear_attn.in_proj_"
    errors = {f"{prefix}a.weight": Difference(0.09, 1.0, 0.5), f"{prefix}b.weight": Difference(0.01, 1.0, 0.5)}
    write_card(folder, Facts("out", "x", "4bit", errors=errors))
    told = texts((folder / PLOT).read_text())
    assert any("at most 22 %" in text for text in told)  # the root of 0.05, as they have one size
    assert "DeltaNet a, b" in told and "MLP down" not in told
    assert open_checkpoint(folder).config.text.layer_types[0] == LINEAR
