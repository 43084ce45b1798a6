"""With YaRN drafts change no greedy answer: the draft head turns by the model's table."""

import pytest

from mlx_qwen35 import Model, Processor, batch_generate, generate, load

pytestmark = pytest.mark.filterwarnings("ignore:positions are scaled by YaRN:UserWarning")


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano", rope_scaling="yarn:4")


def questions(count: int) -> list[str]:
    return [f"What is {17 * i % 90 + 3} {'+-'[i % 2]} {29 * i % 70 + 2}?" for i in range(count)]


@pytest.mark.parametrize(
    ("count", "tokens"), [(3, 16), pytest.param(200, 48, marks=pytest.mark.full)], ids=["3", "200"]
)
def test_greedy_answers_are_the_same_with_drafts_and_without(nano, count, tokens):
    options = {"temp": 0, "max_tokens": tokens, "enable_thinking": False}
    accepted = 0
    for question in questions(count):
        plain = generate(*nano, question, mtp="off", **options)
        drafted = generate(*nano, question, mtp="on", **options)
        assert drafted.tokens == plain.tokens, question
        accepted += drafted.mtp.accepted
    assert accepted > 0


def test_rows_of_a_batch_are_answered_as_alone(nano):
    options = {"temp": 0, "max_tokens": 12, "enable_thinking": False, "mtp": "off"}
    asked = [questions(1)[0], "Who are you?"]
    together = batch_generate(*nano, asked, **options)
    assert [result.tokens for result in together] == [generate(*nano, question, **options).tokens for question in asked]
