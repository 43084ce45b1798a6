"""What a model loaded with YaRN says and holds: one warning while the context is short, and the longer window."""

import warnings

import mlx.core as mx
import pytest
from refusing import refused

from mlx_qwen35 import generate, load
from mlx_qwen35.engine.plan import warn_of_idle_yarn

SHORT = {"temp": 0, "max_tokens": 2, "enable_thinking": False}


@pytest.fixture(scope="module")
def nano():
    return load("nano", rope_scaling="yarn")


@pytest.fixture(autouse=True)
def nothing_said_yet():
    warn_of_idle_yarn.cache_clear()


def test_that_a_context_is_short_is_said_once(nano):
    with pytest.warns(UserWarning, match="YaRN.*fit the 32,768 tokens of training.*rope_scaling='none'"):
        generate(*nano, "Who are you?", **SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(*nano, "Who are you?", **SHORT)


def test_of_an_answer_that_may_pass_the_length_of_training_nothing_is_said(nano):
    generate(*nano, "Who are you?", **SHORT | {"max_tokens": 32_768, "stop": [" "]})


def test_without_yarn_nothing_is_said():
    generate(*load("nano"), "Who are you?", **SHORT)


def test_the_option_moves_the_window(nano):
    assert nano[0].config.max_position_embeddings == 4 * 32_768
    assert load("nano", rope_scaling="yarn:1.5")[0].config.max_position_embeddings == 49_152


def test_none_and_no_option_give_the_same_bits_and_yarn_others(nano):
    tokens = mx.array([[5, 17, 300, 4, 9]])
    plain, none = load("nano")[0](tokens), load("nano", rope_scaling="none")[0](tokens)
    assert mx.array_equal(plain, none) and not mx.allclose(plain, nano[0](tokens), atol=1e-2)


def test_a_scaling_that_is_none_is_refused():
    with refused("option_invalid", "rope_scaling", "yarn:FACTOR", "'linear'"):
        load("nano", rope_scaling="linear")
