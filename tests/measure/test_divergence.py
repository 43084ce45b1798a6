"""Divergence and perplexity are those of the logits of both models."""

import mlx.core as mx
import numpy as np
import pytest
from geometries import changed
from refusing import refused

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.load import load_model
from mlx_qwen35.measure import layerwise
from mlx_qwen35.measure.divergence import Evaluation, divergence, standard_error
from mlx_qwen35.measure.layerwise import Layerwise
from mlx_qwen35.measure.text import windows

TOKENS = [np.random.default_rng(i).integers(0, 1000, n).tolist() for i, n in enumerate((20, 9, 20))]
FIRST = [1, 4, 11]


@pytest.fixture(scope="module")
def pair(raw, tmp_path_factory):
    """A source, and the 4-bit pack of it."""
    out = convert(raw, tmp_path_factory.mktemp("packed") / "out", quantize=True)
    return open_checkpoint(raw), open_checkpoint(out)


def evaluate(source: Checkpoint, packed: Checkpoint, tokens, first=None) -> Evaluation:
    return divergence(Layerwise(source, mx.float32), Layerwise(packed, mx.float32), tokens, first)


def log_probabilities(checkpoint) -> list[np.ndarray]:
    """(T - 1, V) float64 of each sequence."""
    model = load_model(checkpoint, mx.float32, "model")
    logits = [np.array(model(mx.array([row])))[0, :-1].astype(np.float64) for row in TOKENS]
    return [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits]


@pytest.fixture(scope="module")
def expected(pair):
    """KL, losses of source and pack, and agreement at each position that FIRST leaves."""
    source, packed = map(log_probabilities, pair)
    found = []
    for p, q, row, first in zip(source, packed, TOKENS, FIRST, strict=True):
        at, targets = np.arange(first - 1, len(row) - 1), np.array(row[first:])
        kl = (np.exp(p) * (p - q)).sum(-1)[at]
        found.append(np.stack([kl, -p[at, targets], -q[at, targets], (p.argmax(-1) == q.argmax(-1))[at]]))
    return np.concatenate(found, axis=1)


@pytest.fixture(scope="module")
def evaluation(pair):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise, "HEAD_ROWS", 300)  # slices, with a shorter last one
        return evaluate(*pair, TOKENS, FIRST)


def test_kl_divergence_is_that_of_the_logits(evaluation, expected):
    assert evaluation.kl == pytest.approx(expected[0].mean(), abs=2e-6)
    assert evaluation.kl_99 == pytest.approx(np.quantile(expected[0], 0.99), abs=2e-6)


def test_perplexities_are_those_of_the_logits(evaluation, expected):
    assert evaluation.source_perplexity == pytest.approx(np.exp(expected[1].mean()), rel=1e-5)
    assert evaluation.perplexity == pytest.approx(np.exp(expected[2].mean()), rel=1e-5)


def test_agreement_is_that_of_the_logits(evaluation, expected):
    assert 0 < evaluation.top1 < 1 and evaluation.top1 == pytest.approx(expected[3].mean())


def test_only_positions_from_the_first_on_count(evaluation):
    assert (evaluation.sequences, evaluation.positions) == (3, 19 + 5 + 9)


def test_a_model_is_not_apart_from_itself(pair):
    same = evaluate(pair[0], pair[0], TOKENS)
    assert (same.top1, same.kl_error, set(same.layers)) == (1, 0, {0})
    assert abs(same.kl) < 1e-12 and same.perplexity == same.source_perplexity


def test_layers_tell_the_error_of_the_residual_stream(pair, evaluation):
    states = []
    for checkpoint in pair:
        model = load_model(checkpoint, mx.float32, "model")
        seen: list[mx.array] = []
        for row in TOKENS:
            model.hidden(mx.array([row]), pace=lambda arrays, seen=seen: seen.append(arrays[0] + arrays[1]))
        count = len(model.layers)
        states.append([np.concatenate([np.array(x)[0] for x in seen[i::count]]) for i in range(count)])
    errors = [np.sqrt(np.square(b - a).sum() / np.square(a).sum()) for a, b in zip(*states, strict=True)]
    assert evaluation.layers == pytest.approx(errors, rel=1e-4)


def test_standard_error_takes_the_positions_of_a_sequence_together():
    values, sequences = np.array([1.0, 1.0, 3.0, 3.0]), np.array([0, 0, 7, 7])
    assert standard_error(values, sequences) == pytest.approx(1.0)  # two means, 1 and 3
    assert standard_error(values, np.arange(4)) == pytest.approx(np.std(values, ddof=1) / 2)


def test_one_sequence_has_no_standard_error(pair):
    result = evaluate(*pair, TOKENS[:1])
    assert result.kl_error is None and result.top1_error is None


def test_models_of_other_sizes_are_refused(pair, tmp_path):
    other = write_random_checkpoint(tmp_path / "raw", changed(geometry("tiny"), intermediate_size=128))
    with refused("models_differ"):
        evaluate(pair[0], open_checkpoint(other), TOKENS)


@pytest.mark.parametrize("first", [[1], [0, 1, 1]])
def test_a_first_token_that_nothing_predicts_is_refused(pair, first):
    with refused("option_invalid", "first"):
        evaluate(*pair, TOKENS, first)


def test_sequences_of_one_token_are_refused(pair):
    with refused("text_too_short", "2"):
        evaluate(*pair, [[1], [2]])


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_in_windows_of_its_tokens(pair):
    from tokenizers import Tokenizer

    text = "What is 34 + 58? Repeat: circle, square, triangle."
    tokens = Tokenizer.from_file(str(pair[0].folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    cut = windows(pair[0], text, 5)
    assert all(len(window) == 5 for window in cut[:-1]) and len(cut) > 2
    assert [token for window in cut for token in window] == tokens[: len(tokens) - (len(tokens) % 5 == 1)]


def test_no_more_tokens_are_taken_than_asked_for(pair):
    assert [len(window) for window in windows(pair[0], "one two three " * 50, 8, 20)] == [8, 8, 4]
    assert [len(window) for window in windows(pair[0], "one two three " * 50, 8, 17)] == [8, 8]


def test_a_text_without_two_tokens_is_refused(pair):
    with refused("text_too_short", "2", "0"):
        windows(pair[0], "")


def test_a_window_of_one_token_is_refused(pair):
    with refused("option_invalid", "2", "1", "4096"):
        windows(pair[0], "text", 1)
