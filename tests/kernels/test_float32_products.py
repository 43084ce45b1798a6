"""float32 that is asked for is float32: the commands see to it, and where it is not the user is told."""

import os

import pytest
from kernels.shortened import shortened_products

from mlx_qwen35 import load
from mlx_qwen35.backend import TF32
from mlx_qwen35.console.run import as_command
from mlx_qwen35.doctor import facts
from mlx_qwen35.kernels.products import shortened


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.delenv(TF32, raising=False)


def test_these_tests_have_chosen_products_and_run_on_whole_ones():
    assert TF32 in os.environ
    assert not shortened()


@pytest.mark.usefixtures("unset")
def test_commands_ask_mlx_for_whole_float32_products():
    with as_command("a command"):
        assert os.environ[TF32] == "0"


def test_the_user_s_setting_of_products_wins(monkeypatch):
    monkeypatch.setenv(TF32, "1")
    with as_command("a command"):
        assert os.environ[TF32] == "1"


@pytest.mark.usefixtures("unset")
def test_loading_a_model_in_a_program_of_one_s_own_sets_nothing_of_products():
    load("nano")
    assert TF32 not in os.environ


def test_float32_is_warned_of_where_products_are_shortened():
    with shortened_products(), pytest.warns(RuntimeWarning, match=f"float32 .* 10 bits .* {TF32}=0"):
        load("nano", dtype="float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_not_warned_of_where_products_are_shortened(dtype):
    with shortened_products():
        load("nano", dtype=dtype)  # a warning would be an error


def test_float32_is_not_warned_of_where_products_are_whole():
    load("nano", dtype="float32")


def test_the_doctor_shows_what_products_are_made_of_and_who_chose(monkeypatch):
    monkeypatch.setenv(TF32, "1")
    with shortened_products():
        shown = facts.settings(dict(os.environ))[TF32]
    assert shown == "1, set by you; products of float32 matrices have operands rounded to 10 bits of mantissa"
    monkeypatch.delenv(TF32)
    assert facts.settings(dict(os.environ))[TF32] == "MLX's own; products of float32 matrices have full precision"
