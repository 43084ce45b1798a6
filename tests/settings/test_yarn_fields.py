"""YaRN in config.json, as transformers reads it; the window that follows; and --rope-scaling, which takes its place."""

import math

import pytest
from geometries import changed
from refusing import refused

from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.rope_fields import Yarn, check_rope_scaling, rescaled
from mlx_qwen35.options import on_command_line

ROPE = geometry("4b")["text_config"]["rope_parameters"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144}


def config(window=262_144, **rope):
    """A config.json of this max_position_embeddings with these rotary fields; one that is None is absent."""
    fields = {name: value for name, value in (ROPE | rope).items() if value is not None}
    return changed(geometry("4b"), rope_parameters=fields, max_position_embeddings=window)


def text(values):
    return parse_config(values).text


def test_the_block_of_the_published_card_is_read():
    found = text(config(**YARN))
    assert found.rope.yarn == Yarn(4.0, 262_144, 0.1 * math.log(4) + 1, beta_fast=32, beta_slow=1, truncate=True)
    assert found.max_position_embeddings == 1_048_576
    assert text(geometry("4b")).rope.yarn is None


def test_every_key_of_transformers_is_read():
    keys = {
        "factor": 3, "original_max_position_embeddings": 1000, "beta_fast": 20, "beta_slow": 2.5, "truncate": False,
        "attention_factor": 1.25, "mscale": 0.5, "mscale_all_dim": 0.25,
    }  # fmt: skip
    found = text(config(**YARN | keys))
    assert found.rope.yarn == Yarn(3, 1000, attention_factor=1.25, beta_fast=20, beta_slow=2.5, truncate=False)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"mscale": 1, "mscale_all_dim": 1}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 0}, 1.1386294361),
        ({"mscale": 0.707}, 1.1386294361),
        ({"mscale": 0.707, "mscale_all_dim": 0.5}, (0.0707 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"attention_factor": 1.5, "mscale": 1, "mscale_all_dim": 1}, 1.5),
        ({"factor": 1}, 1.0),
    ],
)
def test_the_attention_factor_is_that_of_transformers(keys, factor):
    assert text(config(**YARN | keys)).rope.yarn.attention_factor == pytest.approx(factor, abs=1e-7)


def test_it_is_read_from_the_older_fields_too():
    values = changed(geometry("4b"), rope_scaling=ROPE | YARN)
    del values["text_config"]["rope_parameters"]
    assert text(values) == text(config(**YARN))
    beside = config(**YARN | {"original_max_position_embeddings": None})
    beside["text_config"]["original_max_position_embeddings"] = 262_144
    assert text(beside) == text(config(**YARN))


@pytest.mark.parametrize("name", ["factor", "original_max_position_embeddings"])
def test_what_has_no_right_default_must_be_there(name):
    """transformers would take max_position_embeddings for the original length: another ramp, without a word."""
    with refused("config_field_missing", f"'{name}'"):
        text(config(window=1_010_000, **YARN | {name: None}))


@pytest.mark.parametrize(
    "keys",
    [
        {"factor": 0.5}, {"factor": 65}, {"factor": "4"}, {"original_max_position_embeddings": 1_048_576},
        {"original_max_position_embeddings": 0}, {"beta_fast": 0.5}, {"beta_slow": 0}, {"attention_factor": 0},
        {"mscale": -1}, {"truncate": 1}, {"rope_theta": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_bounds_is_named(keys):
    with refused("config_field_invalid", f"'{next(iter(keys))}'"):
        text(config(**YARN | keys))


def test_two_types_that_differ_are_refused():
    with refused("config_field_invalid", "'rope_type'"):
        text(config(**YARN | {"type": "default"}))


# --- the window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "factor", "window"),
    [(262_144, 4.0, 1_048_576), (1_010_000, 4.0, 1_010_000), (1_048_576, 2.0, 524_288), (1000, 1.5, 393_216)],
)
def test_the_window_is_the_original_length_times_the_factor_or_what_the_config_limits_it_to(most, factor, window):
    assert text(config(window=most, **YARN | {"factor": factor})).max_position_embeddings == window


def test_a_longer_window_without_scaling_is_refused_with_the_option_to_type():
    with refused("config_field_unsupported", "262,144", "1,048,576", "rope_scaling='yarn'"):
        text(config(window=1_048_576))
    with on_command_line(), refused("config_field_unsupported", "--rope-scaling yarn", "--rope-scaling none"):
        text(config(window=262_145))
    assert text(rescaled(config(window=1_048_576), "yarn:4.0")).max_position_embeddings == 1_048_576
    assert text(rescaled(config(window=1_048_576), "none")).max_position_embeddings == 262_144


# --- the option ------------------------------------------------------------------------------------------------------


def test_the_option_has_a_factor_or_4():
    assert [check_rope_scaling("x", value) for value in ("yarn", "yarn:2", "yarn:1.5", "none")] == [
        "yarn:4.0", "yarn:2.0", "yarn:1.5", "none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value", ["yarn:", "yarn:1", "yarn:65", "yarn:nan", "yarn:x", "linear", "dynamic:2", "YaRN", "none:2", "", 4, True]
)
def test_another_value_is_refused(value):
    with refused("option_invalid", "--rope-scaling", "yarn:FACTOR", "64", repr(value)):
        check_rope_scaling("--rope-scaling", value)


def test_a_null_truncate_is_false_as_in_transformers():
    values = config(**YARN)
    values["text_config"]["rope_parameters"]["truncate"] = None
    assert text(values).rope.yarn.truncate is False


@pytest.mark.parametrize(("window", "trained"), [(1_010_000, 262_144), (32_768, 32_768)])
def test_the_option_mends_a_scaling_without_its_original_length(window, trained):
    broken = config(window=window, **YARN | {"original_max_position_embeddings": None})
    assert text(rescaled(broken, "none")).max_position_embeddings == trained
    assert text(rescaled(broken, "yarn:2.0")).rope.yarn.original == trained


def test_the_option_writes_what_transformers_needs():
    plain, scaled = geometry("4b"), rescaled(geometry("4b"), "yarn:4.0")
    assert scaled["text_config"]["rope_parameters"] == ROPE | YARN
    assert scaled["text_config"]["max_position_embeddings"] == 262_144
    assert rescaled(scaled, "yarn:4.0") == scaled and rescaled(scaled, None) == scaled
    assert rescaled(scaled, "none") == plain == rescaled(plain, "none")


def test_the_option_takes_the_place_of_the_folders_scaling_and_keeps_its_original_length():
    folder = config(window=2304, **YARN | {"factor": 8, "original_max_position_embeddings": 288, "beta_fast": 16})
    assert text(folder).max_position_embeddings == 2304
    other = text(rescaled(folder, "yarn:2.0"))
    assert (other.rope.yarn.factor, other.rope.yarn.original, other.rope.yarn.beta_fast) == (2, 288, 32)
    assert other.max_position_embeddings == 576
    assert text(rescaled(folder, "none")).max_position_embeddings == 288


def test_the_option_reads_a_text_config_at_the_top_and_older_fields():
    values = geometry("4b")["text_config"] | {"model_type": "qwen3_5_text"}
    older = {name: values["rope_parameters"].pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    values["rope_scaling"] = values.pop("rope_parameters")
    assert text(rescaled(values | older, "yarn:4.0")).rope == text(config(**YARN)).rope
