"""Frequencies of the rotary embedding, with and without YaRN, to the bit; its table at far positions."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import load
from mlx_qwen35.checkpoint.config import RopeConfig, parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.rope_fields import rescaled
from mlx_qwen35.model import rotary
from mlx_qwen35.model.rotary import CHECKED, EXACT, Rotary, frequencies, is_exact, table_error

VECTORS = json.loads((Path(__file__).parent / "yarn_vectors.json").read_text())


def config(name: str) -> RopeConfig:
    """Of the 4B: "default", "yarn 4", "yarn 4, truncate false"."""
    kind, _, option = name.partition(", ")
    values = geometry("4b")
    if kind != "default":
        values = rescaled(values, kind.replace(" ", ":"))
    if option:
        values["text_config"]["rope_parameters"]["truncate"] = False
    return parse_config(values).text.rope


def from_hex(numbers: list[str]) -> np.ndarray:
    return np.array([np.frombuffer(bytes.fromhex(number), "<f4")[0] for number in numbers])


@pytest.mark.parametrize("name", VECTORS["frequencies"])
def test_frequencies_are_those_of_transformers_to_the_bit(name):
    np.testing.assert_array_equal(np.array(frequencies(config(name))), from_hex(VECTORS["frequencies"][name]))


@pytest.mark.parametrize("name", VECTORS["attention factors"])
def test_cosines_and_sines_are_multiplied_by_the_attention_factor(name):
    given = config(name)
    assert given.yarn.attention_factor == pytest.approx(VECTORS["attention factors"][name], abs=1e-7)
    cos, sin = Rotary(given).table(mx.array([[0, 7, 300_000]]))
    assert mx.abs(mx.sqrt(cos**2 + sin**2) - given.yarn.attention_factor).max().item() < 1e-6


def test_the_table_of_three_axes_is_that_of_transformers():
    """The angles are the same to the bit; cosines of two libraries differ in the last one."""
    table = VECTORS["table"]
    cos, sin = Rotary(config("yarn 4")).table(mx.array(table["positions"])[:, None, None])
    assert np.abs(np.array(cos).ravel() - from_hex(table["cos"])).max() < 3e-7
    assert np.abs(np.array(sin).ravel() - from_hex(table["sin"])).max() < 3e-7


def test_without_yarn_the_table_has_the_bits_of_cosines_and_sines():
    plain = Rotary(config("default"))
    positions = mx.array([[0, 1, 262_143]])
    angles = positions[..., None].astype(mx.float32) * plain.frequencies
    for ours, theirs in zip(plain.table(positions), (mx.cos(angles), mx.sin(angles)), strict=True):
        assert mx.array_equal(ours[:, 0], theirs)


def test_the_ramp_of_vllm_is_that_of_another_original_length():
    given = config("yarn 4")
    theirs = replace(given, yarn=replace(given.yarn, original=4 * given.yarn.original))
    np.testing.assert_allclose(np.array(frequencies(theirs)), VECTORS["ramp of vLLM, yarn 4, float64"], rtol=2e-7)


def test_a_ramp_of_no_length_is_a_step():
    given = config("yarn 4")
    steep = replace(given, yarn=replace(given.yarn, beta_slow=32, truncate=False))  # both ends at 14.24
    slowed = np.array([1] * 15 + [4] * 17, np.float32)
    np.testing.assert_array_equal(np.array(frequencies(steep)), np.array(frequencies(config("default"))) / slowed)


# --- far positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "yarn 4"])
@pytest.mark.parametrize("position", CHECKED)
def test_far_cosines_and_sines_are_exact(name, position):
    given = Rotary(config(name))
    cos, sin = (np.array(table).ravel() / given.factor for table in given.table(mx.array([[position]])))
    angles = np.float32(position) * np.array(given.frequencies)
    assert angles.dtype == np.float32
    exact = [(math.cos(float(angle)), math.sin(float(angle))) for angle in angles]
    assert np.abs(np.stack([cos, sin], axis=-1) - exact).max() < 1e-6


@pytest.fixture
def wrong_cosines(monkeypatch):
    """Every device's cosines count as wrong."""
    is_exact.cache_clear()
    monkeypatch.setattr(rotary, "EXACT", -1.0)
    yield
    is_exact.cache_clear()


def test_where_cosines_are_wrong_the_table_is_computed_on_the_cpu_and_that_is_said_once(wrong_cosines):
    given, positions = config("yarn 4"), mx.array([[3, 1_000_000]])
    with pytest.warns(RuntimeWarning, match="wrong by .*: the rotary table is computed on the CPU"):
        cos, sin = Rotary(given).table(positions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Rotary(given).table(positions)
    angles = np.array(positions).astype(np.float32)[..., None] * np.array(frequencies(given))
    assert np.abs(np.array(cos[:, 0]) - given.yarn.attention_factor * np.cos(angles.astype(np.float64))).max() < EXACT
    assert np.abs(np.array(sin[:, 0]) - given.yarn.attention_factor * np.sin(angles.astype(np.float64))).max() < EXACT


def test_the_table_is_checked_while_a_model_is_loaded(wrong_cosines):
    with pytest.warns(RuntimeWarning, match="rotary table"):
        load("nano")


def test_a_wrong_cosine_is_an_error(monkeypatch):
    assert table_error(config("yarn 4")) < EXACT
    cos = mx.cos
    monkeypatch.setattr(mx, "cos", lambda angles: cos(angles * (1 + 2**-22)))
    assert table_error(config("yarn 4")) > 1e-3
