"""Scores of texts: those of the logits, in any chunks, in bounded memory, and what is refused."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from geometries import changed
from memory_use import active
from mtp.drafting import SMALL
from refusing import refused

from mlx_qwen35 import Model, generate, load, score
from mlx_qwen35.budget.plan import most_tokens, this_machine
from mlx_qwen35.checkpoint.config import LINEAR
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.machine.process import LOCK
from mlx_qwen35.measure.score import predict

TEXT = "What is 34 + 58? It is 92, and the circle is red."
ASK = "What is 34 + 58?"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def log_softmax(model: Model, tokens) -> np.ndarray:
    """(T - 1, V) float64"""
    logits = np.array(model(mx.array([list(tokens)]))[0, :-1]).astype(np.float64)
    highest = logits.max(-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))


def random_tokens(count: int, vocabulary: int = 1000) -> list[int]:
    return np.random.default_rng(count).integers(0, vocabulary, count).tolist()


# --- what they are ----------------------------------------------------------------------------------------------------


def test_a_score_is_that_of_the_logits(nano):
    model, processor = nano
    found = score(model, processor, TEXT)
    tokens = processor.encode_text(TEXT).tokens
    assert found.context + found.tokens == tokens and len(found.context) == 1
    expected = log_softmax(model, tokens)
    own = expected[np.arange(len(expected)), found.tokens]
    assert found.logprobs.dtype == np.float32
    np.testing.assert_allclose(found.logprobs, own, atol=3e-5)  # of -30 to 0, float32
    np.testing.assert_array_equal(found.greedy, expected.argmax(-1) == found.tokens)
    assert found.sum == pytest.approx(own.sum(), rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(-own.mean()), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_size_of_chunks_changes_nothing(text_model, chunk):
    model, tokens = text_model(SMALL), random_tokens(100, 250)
    whole, parts = predict(model, tokens, 3, 1000), predict(model, tokens, 3, chunk)
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=1e-5)
    np.testing.assert_array_equal(parts.best, whole.best)


def test_an_answer_is_scored_as_it_was_generated(nano):
    model, processor = nano
    result = generate(model, processor, ASK, temp=0, logprobs=True)
    prompt = processor.encode_messages([{"role": "user", "content": ASK}]).tokens
    found = score(model, processor, list(prompt), list(result.tokens))
    assert (found.context, found.tokens) == (prompt, result.tokens) and found.is_greedy
    np.testing.assert_allclose(found.logprobs, [told.logprob for told in result.logprobs], atol=2e-5)
    assert not score(model, processor, list(prompt), [*result.tokens[:-1], 7]).is_greedy


def test_a_continuation_is_scored_as_in_its_text(nano):
    model, processor = nano
    for kind in (list, np.array, mx.array):
        tokens = list(processor.encode_text(TEXT).tokens)
        found, whole = (score(model, processor, *map(kind, given)) for given in ([tokens[:9], tokens[9:]], [tokens]))
        assert found.context == tuple(tokens[:9])
        np.testing.assert_allclose(found.logprobs, whole.logprobs[8:], atol=3e-5)  # other rows in a product


@pytest.mark.parametrize(
    ("before", "behind", "scored"),
    [
        ("The sky is", " blue", " blue"), ("The sky is ", "blue", " blue"), ("The sky is  ", "blue", " blue"),
        ("The circle is bl", "ue", " blue"), ("</think>\n\n", "92", "92"), ("Yes", "<|im_end|>", "<|im_end|>"),
    ],
)  # fmt: skip
def test_text_and_continuation_are_encoded_together_and_tokens_of_both_are_scored(nano, before, behind, scored):
    model, processor = nano
    found = score(model, processor, before, behind)
    assert found.context + found.tokens == processor.encode_text(before + behind).tokens
    assert b"".join(map(processor.token_bytes, found.tokens)).decode() == scored


def test_control_tokens_of_a_text_are_control_tokens(nano):
    found = score(*nano, "<|im_start|>user\nHi<|im_end|>")
    assert nano[1].token_bytes(found.context[0]) == b"<|im_start|>" and found.tokens[-1] in nano[1].stop_ids


def test_progress_is_told(nano):
    seen = []
    tokens = random_tokens(50, 900)
    score(*nano, tokens, prefill_step_size=20, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(20, 49), (40, 49), (49, 49)]


def test_it_waits_for_what_computes_in_another_thread(nano):
    done = threading.Event()
    thread = threading.Thread(target=lambda: (score(*nano, TEXT), done.set()))
    with LOCK:
        thread.start()
        assert not done.wait(0.2)
    thread.join(timeout=60)
    assert done.is_set()


# --- memory -----------------------------------------------------------------------------------------------------------


def peak(model: Model, length: int, chunk: int) -> int:
    """Bytes at most while so many tokens are scored, beside what is held already."""
    before = active()
    mx.reset_peak_memory()
    predict(model, random_tokens(length), 1, chunk)
    return mx.get_peak_memory() - before


@pytest.mark.full
def test_memory_does_not_grow_with_the_length(text_model):
    """Of layers whose cache does not grow either. All logits of 64 and 256 tokens would be 2 and 8 MB."""
    model = text_model(changed(SMALL, num_hidden_layers=2, layer_types=[LINEAR, LINEAR], vocab_size=8192))
    short, long = peak(model, 64, 32), peak(model, 256, 32)
    assert long < 1.5 * short and long < 2e6


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [("",), ([],), ("a",), ([5],), ("", "a"), ([], [5]), ([5], []), ("a", ""), ("bl", "ue")],
)
def test_too_few_tokens_are_refused(nano, given):
    with refused("text_too_short", "1" if len(given) > 1 else "2"):
        score(*nano, *given)


@pytest.mark.parametrize("tokens", [[5, -1], [5, 10**6], [5, 1.5], [5, True], ["a", "b"], [[5, 6]]])
def test_tokens_that_are_none_are_refused(nano, tokens):
    for given in ((tokens,), ([5], tokens), (tokens, [5])):
        with refused("tokens_invalid", nano[1].vocabulary - 1):
            score(*nano, *given)


def test_what_stands_for_an_image_is_refused(nano):
    (image, *_) = nano[1].placeholder_ids
    with refused("tokens_invalid", image):
        score(*nano, [5, image])
    with refused("placeholders_mismatch"):
        score(*nano, "See <|image_pad|> here")


@pytest.mark.parametrize(
    "given", [([{"role": "user", "content": "Hi"}],), (7,), (None,), ({"a": 1},), ("a b", [5]), ([5, 6], "a")]
)
def test_what_is_neither_text_nor_tokens_is_refused(nano, given):
    with refused("prompt_invalid"):
        score(*nano, *given)


@pytest.mark.parametrize("swapped", [lambda m, p: (p, m), lambda m, p: ("nano", p), lambda m, p: (m, None)])
def test_a_model_and_a_processor_that_are_none_are_refused(nano, swapped):
    with refused("option_invalid", "load()"):
        score(*swapped(*nano), TEXT)


def test_a_text_beyond_the_context_is_refused_and_one_token_behind_it_is_not(text_model, nano):
    model = text_model(changed(geometry("tiny"), max_position_embeddings=40), seed=1)
    assert len(score(model, nano[1], random_tokens(41, 900)).tokens) == 40
    with refused("context_length_exceeded", "41", "42"):
        score(model, nano[1], random_tokens(42, 900))


def test_a_text_without_room_in_memory_is_refused(nano):
    model = load("nano")[0]
    model.memory_limit = mx.get_active_memory() + 3_000_000
    room = most_tokens(model.config, this_machine(model.config, model.dtype, model.memory_limit), 32, [0])
    with refused("memory_exceeded", f"{room:,}", "memory_limit"):
        score(model, nano[1], [5] * (room + 500), prefill_step_size=32)


def test_a_step_beyond_the_text_takes_no_more_memory(nano):
    assert score(*nano, TEXT, prefill_step_size=10**9).sum == pytest.approx(score(*nano, TEXT).sum, abs=1e-3)


@pytest.mark.parametrize("step", [0, "2", 1.5])
def test_a_step_that_is_none_is_refused(nano, step):
    with refused("option_invalid", "prefill_step_size"):
        score(*nano, TEXT, prefill_step_size=step)


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
def test_logits_that_are_not_finite_are_refused(nano, monkeypatch, value):
    logits = Model.logits
    last = mx.arange(1024) == 1023
    monkeypatch.setattr(Model, "logits", lambda self, *given: mx.where(last, value, logits(self, *given)))
    with refused("logits_not_finite"):
        score(*nano, TEXT)
