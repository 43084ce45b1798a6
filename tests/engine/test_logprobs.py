"""Log-probabilities of generated tokens: those of the model's own logits, for rows that ask."""

import mlx.core as mx
import numpy as np
import pytest
from engine.schedules import VOCABULARY, random_cases, together
from many_scripts import EMOJI, MIXED
from mtp.drafting import SMALL, load_small
from refusing import refused

from mlx_qwen35 import Conversation, Model, TokenLogprob, batch_generate, generate, load
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.engine.drafts.speculate import DraftPolicy
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import start
from mlx_qwen35.engine.logprobs import LogprobScorer
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.prompt.tokenizer import load_tokenizer

ASK = "What is 34 + 58?"
NEAR = 4e-5  # between a pass over many tokens and passes over one to four, float32
TOP = 3


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture(scope="module")
def model(checkpoint_folder, tmp_path_factory) -> Model:
    return load_small(checkpoint_folder(SMALL), tmp_path_factory.mktemp("logprobs") / "model")


def log_softmax(model: Model, prompt, tokens) -> np.ndarray:
    """(n, V) float64, of the logits that each token was sampled from, by one pass over all tokens."""
    logits = np.array(model(mx.array([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :]).astype(np.float64)
    highest = logits.max(-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))


def check(found, tokens, expected: np.ndarray, top: int, vocabulary: int) -> None:
    """found is what log_softmax gives for these tokens."""
    assert [told.token for told in found] == list(tokens)
    for told, row in zip(found, expected, strict=True):
        assert abs(told.logprob - row[told.token]) < NEAR
        assert len(told.top) == top and all(abs(other.logprob - row[other.token]) < NEAR for other in told.top)
        best = np.sort(row[:vocabulary])[::-1][:top]
        np.testing.assert_allclose([other.logprob for other in told.top], best, atol=NEAR)


# --- what they are ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "greedy": {"temp": 0},
    "sampled": {"temp": 1.3, "top_k": 5, "presence_penalty": 1.5, "logit_bias": {24: -9}},
    "their own": {"logits_processors": [lambda tokens, logits: logits * 0.5], "sampler": lambda x: mx.argmax(x, -1)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_they_are_of_the_logits_before_any_processing(nano, options):
    model, processor = nano
    generation = start(model, processor, [ASK], seed=3, logprobs=True, top_logprobs=4, max_tokens=16, **options)
    assert [len(request.logprobs) for request in generation.requests] == [0]
    for _ in generation:
        (request,) = generation.requests
        assert len(request.logprobs) == len(request.tokens)  # as they come
    (result,) = generation.results()
    expected = log_softmax(model, request.prompt.tokens, result.tokens)
    check(result.logprobs, result.tokens, expected, 4, processor.vocabulary)


def test_drafts_change_none(nano):
    off, on = (
        generate(*nano, ASK, seed=1, logprobs=True, top_logprobs=TOP, mtp=mtp, max_tokens=30) for mtp in ("off", "on")
    )
    assert on.mtp.accepted and on.tokens == off.tokens
    for one, other in zip(off.logprobs, on.logprobs, strict=True):
        assert (one.token, one.text, one.bytes) == (other.token, other.text, other.bytes)
        assert abs(one.logprob - other.logprob) < NEAR


class Asking(Engine):
    """Every second sequence asks, each for another number of tokens."""

    added = 0

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            if self.added % 2 == 0:
                sequence.scorer = LogprobScorer(self.added // 2 % 4, VOCABULARY, lambda token: bytes([token]))
            self.added += 1
        super().add(*sequences)


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.full) for seed in (3, *range(7, 35)))])
def test_rows_that_ask_get_them_in_any_schedule_and_no_row_gets_another_text(model, seed):
    """Joins, leaves, cancellations, drafts, constraints and penalties, as in test_rows.py."""
    cases = random_cases(seed)
    plain = together(model, cases, interleave=bool(seed % 2))
    asked = 0
    for case, before, sequence in zip(cases, plain, together(model, cases, bool(seed % 2), Asking), strict=True):
        assert sequence.tokens == before.tokens and sequence.error is None
        result = sequence.result()
        if sequence.scorer is None:
            assert result.logprobs is None
        elif sequence.tokens:
            expected = log_softmax(model, case.prompt, sequence.tokens)
            check(result.logprobs, sequence.tokens, expected, sequence.scorer.top, VOCABULARY)
            asked += 1
    assert asked and any(sequence.result().logprobs is None for sequence in plain)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_row_that_leaves_takes_its_own_along(model, depth):
    """While a pass is under way that was fed with it."""
    prompts, limits = ([5, 6], [7, 8, 9], [3]), (3, 9, 9)
    engine, sequences = Engine(model), []
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        sequences.append(Sequence(
            Prompt(tuple(prompt), thinking=False), Sampler(Sampling(temp=1.0), row, len(prompt), VOCABULARY), limit,
            prefill_step_size=64, drafts=DraftPolicy(depth, fixed=bool(depth)),
            scorer=LogprobScorer(row, VOCABULARY, lambda token: b"") if row else None,
        ))  # fmt: skip
    engine.add(*sequences)
    while not engine.idle:
        engine.step()
    assert [len(sequence.tokens) for sequence in sequences] == list(limits) and sequences[0].logprobs == []
    for row, sequence in list(enumerate(sequences))[1:]:
        expected = log_softmax(model, prompts[row], sequence.tokens)
        check(sequence.logprobs, sequence.tokens, expected, row, VOCABULARY)


def test_rows_of_padding_count_in_the_sum_and_are_not_among_the_most_probable():
    logits = mx.array([[1.0, 3.0, 2.0, 9.0]])  # the last one is beyond the tokenizer
    scorer = LogprobScorer(20, 3, lambda token: b"")
    told = scorer.told(1, scorer.score(logits, mx.array([1], mx.uint32)), 0)
    normalizer = np.log(np.exp([1.0, 3.0, 2.0, 9.0]).sum())
    assert told.logprob == pytest.approx(3 - normalizer, abs=1e-6)
    assert [(other.token, other.logprob) for other in told.top] == [
        (token, pytest.approx(logit - normalizer, abs=1e-6)) for token, logit in ((1, 3), (2, 2), (0, 1))
    ]


def test_half_types_are_reckoned_in_float32(rng):
    logits = mx.array(rng.normal(0, 4, (2, 500)), mx.bfloat16)
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    scorer = LogprobScorer(0, 500, lambda token: b"")
    scores = scorer.score(logits, mx.array([7, 9]))
    expected = exact[[0, 1], [7, 9]] - np.log(np.exp(exact).sum(-1))
    np.testing.assert_allclose(np.array(scores.logprobs), expected, atol=2e-6)


def test_a_row_that_fails_has_one_for_each_of_its_tokens(nano, monkeypatch):
    logits = Model.logits
    monkeypatch.setattr(  # the second row's, in every pass
        Model, "logits",
        lambda self, hidden, *_: logits(self, hidden) * mx.where(mx.arange(len(hidden)) == 1, mx.nan, 1)
        .reshape(-1, *[1] * (hidden.ndim - 1)),
    )  # fmt: skip
    good, failed = batch_generate(*nano, [ASK, "Hello"], logprobs=True)
    assert failed.finish_reason == "error" and len(failed.logprobs) == len(failed.tokens) == 1
    assert len(good.logprobs) == len(good.tokens) > 1


def test_a_token_that_is_in_the_cache_at_ctrl_c_has_its_own(nano, monkeypatch):
    """The next pass was fed with it before the host knew it."""
    model, processor = nano
    generation = start(model, processor, [ASK], seed=0, mtp="off", logprobs=True)
    (request,) = generation.requests
    as_array = np.array

    def interrupted(given, *rest, **options):
        if isinstance(given, mx.array) and given.dtype == mx.bool_ and len(request.tokens) == 3:
            raise KeyboardInterrupt
        return as_array(given, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "array", interrupted)
        list(generation)
    assert len(request.tokens) == 4 and request.finish_reason == "interrupted"
    expected = log_softmax(model, request.prompt.tokens, request.tokens)
    check(request.logprobs, request.tokens, expected, 0, processor.vocabulary)


def test_a_turn_of_a_conversation_has_them(nano):
    turn = Conversation(*nano, enable_thinking=False, logprobs=True, seed=0).send(ASK)
    assert turn.text and [told.token for told in turn.result.logprobs] == list(turn.result.tokens)


def test_the_bytes_of_all_tokens_are_the_text(nano):
    result = generate(*nano, ASK, seed=0, logprobs=True, top_logprobs=1, enable_thinking=False)
    assert isinstance(result.logprobs[0], TokenLogprob)
    assert b"".join(told.bytes for told in result.logprobs).decode() == result.text + "<|im_end|>"


def test_without_them_there_are_none(nano):
    assert generate(*nano, ASK, max_tokens=3).logprobs is None
    assert generate(*nano, ASK, max_tokens=3, logprobs=False).logprobs is None


@pytest.mark.parametrize("options", [{}, {"logprobs": False}])
def test_top_logprobs_alone_are_refused(nano, options):
    with refused("option_no_effect", "top_logprobs", "logprobs"):
        generate(*nano, ASK, top_logprobs=2, **options)


# --- the bytes of a token ---------------------------------------------------------------------------------------------


def test_the_bytes_of_a_token_are_what_it_decodes_to(nano):
    processor = nano[1]
    for token in range(processor.vocabulary):
        assert processor.token_bytes(token).decode(errors="replace") == processor.decode([token])


def test_a_character_of_several_tokens_is_whole_in_their_bytes(nano):
    processor = nano[1]
    for text in [*EMOJI, *MIXED, "\x00\x7f\xa0\xad\u0100"]:
        tokens = processor.tokenizer.encode(text)
        data = b"".join(map(processor.token_bytes, tokens))
        assert data.decode() == processor.decode(tokens)


def test_an_added_token_stands_for_its_text():
    tokenizer = load_tokenizer(resolve("nano"))
    tokenizer.backend.add_tokens(["Ġné"])
    added = tokenizer.backend.token_to_id("Ġné")
    assert tokenizer.token_bytes(added) == "Ġné".encode() and tokenizer.token_bytes(added + 1) == b""


@pytest.mark.parametrize("token", [-1, 10**6, 1.5])
def test_an_id_that_is_none_has_no_bytes(nano, token):
    with refused("option_invalid", "token"):
        nano[1].token_bytes(token)
