"""Scores and differences, with their standard errors, against figures computed by hand."""

from dataclasses import replace

import pytest

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.evaluate.compare import mean_and_error, paired
from mlx_qwen35.evaluate.published import CARD, published_of
from mlx_qwen35.evaluate.summary import described, entry, outcome
from mlx_qwen35.evaluate.task import Published


def lines(scores: str, **more):
    return [
        {"key": str(place), "seed": place, "score": float(score), "tokens": 10, "cut_at_limit": False, **more}
        for place, score in enumerate(scores)
    ]


def test_the_standard_error_of_a_score_is_that_of_a_mean():
    # 3 of 4 right: mean 0.75, squared distances 3 x 0.0625 + 0.5625 = 0.75, / 3 / 4 = 0.0625
    assert mean_and_error([1, 1, 1, 0]) == (0.75, 0.25)
    assert mean_and_error([0.5]) == (0.5, None)


def test_the_paired_difference_is_that_of_a_hand_computed_case():
    # gaps +1, 0, -1, +1, 0: mean 0.2, squared distances 0.64 + 0.04 + 1.44 + 0.64 + 0.04 = 2.8, / 4 / 5 = 0.14
    found = paired(lines("11011"), lines("01101"))
    assert found.difference == pytest.approx(0.2) and found.standard_error == pytest.approx(0.14**0.5)
    assert (found.n, found.changed, found.better, found.worse) == (5, 3, ("0", "3"), ("2",))


def test_texts_of_other_lengths_weigh_by_them():
    # 3 of weight 1, 1 of weight 3: mean 6 / 4 = 1.5; squared distances (1 * 1.5)^2 + (3 * -0.5)^2 = 4.5, * 2, / 4 / 4
    assert mean_and_error([3.0, 1.0], [1.0, 3.0]) == (1.5, 0.75)
    assert mean_and_error([3.0, 1.0, 0.0], [1.0, 3.0, 0.0]) == (1.5, 0.75)  # a weight of 0 is no text


def test_where_lower_is_better_less_is_better_and_a_text_that_was_not_read_is_left_out():
    ours = [{"key": str(place), "score": score, "weight": 2.0} for place, score in enumerate([3.0, 1.0, 5.0])]
    theirs = [line | {"score": 2.0} for line in ours[:2]] + [ours[2] | {"score": 0.0, "weight": 0.0}]
    found = paired(ours, theirs, lower=True)
    assert (found.better, found.worse, found.difference) == (("1",), ("0",), 0.0)


def test_models_that_answer_alike_differ_by_nothing():
    found = paired(lines("101"), lines("101"))
    assert (found.difference, found.standard_error, found.changed) == (0.0, 0.0, 0)


def test_a_summary_holds_what_came_and_what_was_published():
    some = [*lines("110"), *lines("0", cut_at_limit=True, image_tokens=4, prompt_tokens=7)]
    told = entry(outcome(some, 12.5, "v1", {"temp": 0.0, "max_tokens": 9}, Published(0.791, "the card")))
    assert (told["n"], told["score"], told["cut_at_limit"], told["tokens"]) == (4, 0.5, 1, 40)
    assert (told["seconds"], told["image_tokens"], told["prompt_tokens"]) == (12.5, 4, 7)
    assert told["published"] == {"score": 0.791, "source": "the card", "note": ""}
    assert told["versions"].keys() == {"mlx-qwen35", "mlx", "task"} and told["settings"]["temp"] == 0.0
    text = described({"loaded": {"model": {"name": "nano"}, "against": None}, "tasks": {"sums": told}})
    for fact in ("50.0 ± 28.9", "79.1", "1 of 4 answers", "at 9 tokens"):
        assert fact in text


def test_the_cards_figures_stand_beside_the_4b_alone():
    nano, card = open_checkpoint(resolve("nano")).config.text, Published(0.795, CARD, "")
    of_4b = replace(nano, layer_types=4 * nano.layer_types, hidden_size=2560, vocab_size=248320)
    assert published_of(card, nano) is None and published_of(card, of_4b) is card
    own = Published(0.9, "our house", "")
    assert published_of(own, nano) is own and published_of(None, nano) is None
