"""What measures drafts: acceptance over texts, and the steps of an answer."""

import acceptance as nano_acceptance  # of examples/nano, as guesses and tasks
import mlx.core as mx
import numpy as np
import pytest
from guesses import Text, acceptance, accepted, answer, coupled, guesses, shares
from tasks import items_of

import mlx_qwen35
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.model.mtp import MultiTokenPrediction
from mlx_qwen35.prompt.prompt import Prompt

TOKENS = tuple((7 * i + i * i) % 900 for i in range(14))


@pytest.fixture(scope="module")
def nano():
    return mlx_qwen35.load("nano")


# --- acceptance over texts -------------------------------------------------------------------------------------------


def test_the_model_s_guesses_are_its_own(text_model):
    model = text_model()
    hidden, drafted = guesses(model, Text(TOKENS, 5))
    whole = model.hidden(mx.array([TOKENS]))[0]
    assert hidden.shape == drafted.shape == (9, 256)
    assert mx.abs(hidden - whole[4:13]).max().item() < 1e-4


def test_the_head_s_guesses_are_the_drafts_of_decoding(text_model):
    model = text_model()
    _, drafted = guesses(model, Text(TOKENS))
    said = mx.argmax(model.logits(drafted), axis=-1).tolist()
    for j in (2, 3, 9):  # the token that is guessed: the model is about to read the one before it
        cache = model.make_cache()
        drafts = DraftFollower(model, [0])
        tokens = mx.array([TOKENS[: j - 1]])
        drafts.prefill(model, tokens, model.hidden(tokens, cache), [j - 1], [0])
        last = mx.array([[TOKENS[j - 1]]])
        token = drafts.propose(model, last, [1], 1, lambda logits, drafted: mx.argmax(logits, axis=-1))
        assert token.item() == said[j - 2]


def test_before_the_norm_the_head_is_given_what_the_norm_is_of(text_model, monkeypatch):
    model, given, call = text_model(), [], MultiTokenPrediction.__call__

    def spy(head: MultiTokenPrediction, embeddings: mx.array, hidden: mx.array, *rest: object) -> mx.array:
        given.append(hidden)
        return call(head, embeddings, hidden, *rest)

    monkeypatch.setattr(MultiTokenPrediction, "__call__", spy)
    after, before = (guesses(model, Text(TOKENS), before_norm)[1] for before_norm in (False, True))
    assert mx.abs(model.norm(given[1]) - given[0]).max().item() < 1e-4
    assert mx.abs(after - before).max().item() > 1e-3


def test_shares_are_of_the_tokens_that_count(text_model):
    model = text_model()
    found = acceptance(model, [Text(TOKENS, 5), Text(TOKENS)], 1.0, range(2), 900)
    assert found.tokens == 9 + 12
    expected = []
    for first in (5, 2):
        p, q = (np.array(model.logits(x).astype(mx.float32))[:, :900] for x in guesses(model, Text(TOKENS, first)))
        p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (p, q))
        expected += list(np.minimum(p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)).sum(-1))
    assert found.classical == pytest.approx(np.mean(expected), abs=1e-4)


def test_coupled_acceptance_is_that_of_two_draws_with_the_same_noise():
    """Its expectation is known: the sum over tokens x of 1 / sum over y of max(p_y / p_x, q_y / q_x)."""
    p, q = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.1, 0.4, 0.2, 0.3])
    exact = sum(1 / np.maximum(p / p[x], q / q[x]).sum() for x in range(4))
    counted = coupled(mx.log(mx.array(p[None])), mx.log(mx.array(q[None])), range(3000), 5)
    assert counted == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 3000) ** 0.5)
    assert exact < np.minimum(p, q).sum()  # never above rejection sampling


def test_what_a_head_that_is_the_model_s_equal_guesses_is_always_accepted():
    p = mx.log(mx.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    assert accepted(p, p, range(4), 5) == (2, 2, pytest.approx(2))


# --- answers ---------------------------------------------------------------------------------------------------------


def test_steps_of_an_answer(text_model):
    model = text_model()
    plain, drafted = (answer(model, Prompt(TOKENS, thinking=False), depth, 12) for depth in (0, 2))
    assert plain.rounds == ((0, 0),) * 11 and len(plain.tokens) == 12
    assert drafted.tokens == plain.tokens
    assert sum(1 + right for _, right in drafted.rounds) == 11 and max(made for made, _ in drafted.rounds) == 2


def test_an_answer_is_what_generate_gives(nano):
    model, processor = nano
    prompt = processor.encode_messages([{"role": "user", "content": "What is 34 + 58?"}])
    result = mlx_qwen35.generate(model, processor, list(prompt.tokens), temp=0.8, seed=3, mtp="off", preset="coding")
    ids = (processor.stop_ids, processor.vocabulary)
    assert answer(model, prompt, 2, 160, Sampling(0.8, 20, 0.95), 3, *ids).tokens == result.tokens


def test_a_share_is_of_the_drafts_whose_predecessors_were_accepted():
    assert shares([(3, 3), (3, 1), (2, 0), (1, 1), (0, 0)], 3) == [3 / 4, 1 / 2, 1.0]
    assert shares([(1, 0)], 2) == [0.0, None]


# --- nano ------------------------------------------------------------------------------------------------------------


def test_nano_s_answers_with_drafts_are_those_without():
    greedy, warm = nano_acceptance.measure("add_2", "nano", 2)
    assert (greedy.temp, warm.temp) == (0, 1) and greedy.same == greedy.answers == warm.same == 2 * 3
    assert greedy.shares[0] == 1.0 and 1.5 < greedy.a_step[0] <= 2 < greedy.a_step[2]
    assert 0.9 < warm.coupled <= 1 and 0.9 < warm.classical <= 1 and warm.guesses == round(2 * greedy.tokens)
    lines = nano_acceptance.table([warm], rules=True).splitlines()
    assert lines[0].endswith("| coupled | classical |") and lines[2].startswith("| add_2 | ")
    assert lines[3].split(" | ")[1:4] == lines[2].split(" | ")[1:4]  # the mean of one


def test_the_transcript_of_a_picture_is_read_as_it_was_answered(nano):
    model, processor = nano
    asked = nano_acceptance.prompt(processor, items_of("colour", False, 1, 0)[0])
    found = answer(model, asked, 0, 160, stop_ids=processor.stop_ids, vocabulary=processor.vocabulary)
    text = nano_acceptance.transcript(model, asked, found.tokens)
    hidden, _ = guesses(model, text)
    assert asked.media and mx.argmax(model.logits(hidden), axis=-1).tolist() == list(found.tokens)
