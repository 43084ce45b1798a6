"""Thinking ends: at its budget, in a loop, and never with an answer that is empty in silence."""

import warnings

import pytest
from refusing import refused

from mlx_qwen35 import Conversation, generate, load
from mlx_qwen35.engine.constraints.thinking import ROOM, SENTENCE, closing_tokens
from mlx_qwen35.engine.generation import start
from mlx_qwen35.errors import EmptyAnswer

QUESTION = "What is 34 + 58?"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture(scope="module")
def endless(nano):
    """Sampling with which thinking never ends by itself, nor the answer."""
    _, processor = nano
    never = (processor.think_start, processor.think_end, *processor.stop_ids)
    return {"logit_bias": dict.fromkeys(never, -100.0), "temp": 1.0, "seed": 5, "loop_guard": False}


def thought(processor, tokens) -> int:
    """Tokens before those that close thinking."""
    return tokens.index(processor.think_end) - (len(closing_tokens(processor)) - 2)


def begun(nano, prompts, count, **options):
    """The first tokens of each answer, and what it has come to then: its room is not waited for."""
    generation = start(*nano, prompts, **options)
    for _ in generation:
        if all(len(request.tokens) >= count for request in generation.requests):
            break
    return [(result.tokens[:count], result) for result in generation.results()]


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("budget", "mtp"),
    [(0, "off"), (1, "on"),
     *(pytest.param(*case, marks=pytest.mark.full) for case in ((0, "on"), (1, "off"), (20, "off"), (20, "on")))],
)  # fmt: skip
def test_endless_thinking_is_closed_at_the_budget_and_an_answer_follows(nano, endless, budget, mtp):
    options = {"thinking_budget": budget, "max_tokens": 301, "mtp": mtp, **endless}
    ((tokens, result),) = begun(nano, [QUESTION], 60, **options)
    assert tokens.index(nano[1].think_end) == 1 if budget == 0 else thought(nano[1], tokens) == budget
    assert result.reasoning.endswith(SENTENCE.strip()) or budget == 0
    assert not result.in_reasoning
    assert result.text and "think>" not in result.text and SENTENCE.strip() not in result.text


def test_a_budget_changes_nothing_before_it_is_spent(nano):
    plain = generate(*nano, QUESTION, temp=1.0, seed=3)
    assert not plain.in_reasoning
    with_budget = generate(*nano, QUESTION, temp=1.0, seed=3, thinking_budget=200, max_tokens=1000)
    assert with_budget.tokens == plain.tokens


@pytest.mark.full
def test_budgets_in_a_batch_with_drafts_are_those_alone(nano, endless):
    """Rows of different thoughts, one of which opens none."""
    prompts = [QUESTION, "What is 7 + 5?", "Who are you?"]
    own = {"thinking_budget": 9, "max_tokens": 290, **endless}
    together = begun(nano, prompts, 40, mtp="on", **own)
    for row, (prompt, (tokens, _)) in enumerate(zip(prompts, together, strict=True)):
        ((alone, _),) = begun(nano, [prompt], 40, mtp="off", **{**own, "seed": 5 + row})
        assert tokens == alone


def test_an_effort_is_a_budget_that_is_cut_to_what_fits(nano, endless):
    _, processor = nano
    closing = len(closing_tokens(processor))
    options = {"reasoning_effort": "minimal", "max_tokens": ROOM + closing + 7, **endless}
    ((tokens, _),) = begun(nano, [QUESTION], 40, **options)
    assert thought(processor, tokens) == 7
    result = generate(*nano, QUESTION, reasoning_effort="minimal", max_tokens=20, **endless)
    assert result.tokens.index(processor.think_end) == 1 and len(result.tokens) == 20


def test_no_effort_is_no_thinking_and_a_high_one_no_budget(nano):
    asked = {"temp": 0, "seed": 1}
    assert generate(*nano, QUESTION, reasoning_effort="none", **asked).tokens == (
        generate(*nano, QUESTION, enable_thinking=False, **asked).tokens
    )
    assert generate(*nano, QUESTION, reasoning_effort="high", **asked).tokens == (
        generate(*nano, QUESTION, **asked).tokens
    )


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("thinking_budget_exceeded", {"thinking_budget": 100, "max_tokens": 300}),
        ("option_invalid", {"thinking_budget": -1}),
        ("option_invalid", {"reasoning_effort": "max"}),
        ("option_conflict", {"thinking_budget": 10, "reasoning_effort": "low"}),
        ("option_conflict", {"thinking_budget": 10, "enable_thinking": False}),
        ("option_conflict", {"reasoning_effort": "none", "preset": "thinking"}),
        ("option_conflict", {"reasoning_effort": "low", "preset": "instruct"}),
    ],
)
def test_a_budget_without_room_or_meaning_is_refused(nano, code, options):
    with refused(code):
        generate(*nano, QUESTION, **options)
    with refused(code):
        Conversation(*nano, **options)


@pytest.mark.parametrize("option", [{"thinking_budget": 5}, {"reasoning_effort": "low"}])
def test_a_budget_for_prompts_that_do_not_think_is_refused(nano, option):
    with refused("option_no_effect", *option):
        generate(*nano, nano[1].tokenizer.encode("plain text"), max_tokens=400, **option)


def test_an_effort_of_none_for_tokens_that_think_is_refused(nano):
    with refused("option_no_effect", "reasoning_effort"):
        generate(*nano, [nano[1].think_start, 5], reasoning_effort="none")


@pytest.mark.parametrize("temp", [0, 1])
def test_a_bias_against_the_token_that_closes_thinking_ends_in_an_error(nano, temp):
    with refused("option_invalid", "logit_bias"):
        generate(
            *nano, QUESTION, thinking_budget=0, max_tokens=400, logit_bias={nano[1].think_end: float("-inf")}, temp=temp
        )


def test_a_conversation_thinks_within_its_budget(nano, endless):
    conversation = Conversation(*nano, thinking_budget=4, max_tokens=290, **endless)
    for question in (QUESTION, "And 7 + 5?"):
        turn = conversation.send(question)
        while turn.result is None or len(turn.result.tokens) < 40:
            next(turn)
        assert turn.result.text and thought(nano[1], turn.result.tokens) == 4


# --- loops ------------------------------------------------------------------------------------------------------------


def looping(processor, *, thinking: bool):
    """Options with which every token is one of two in turn."""
    tokens = processor.tokenizer.encode("a b")[:2]
    return {
        "logits_processors": [_Turns(tokens)], "max_tokens": 600 if thinking else 300, "temp": 0,
        "enable_thinking": thinking,
    }  # fmt: skip


class _Turns:
    """Adds so much to the logit of one token that only a mask keeps it away."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, tokens, logits):
        return logits.at[:, self.tokens[tokens.size % len(self.tokens)]].add(1000.0)


@pytest.mark.full
def test_a_loop_is_told_and_changes_nothing(nano):
    result = generate(*nano, QUESTION, **looping(nano[1], thinking=False))
    assert result.finish_reason == "length" and len(result.tokens) == 300
    assert result.loop is not None and result.loop.period <= 2 and result.loop.start <= 1


def test_a_guarded_loop_ends_the_answer(nano):
    result = generate(*nano, QUESTION, loop_guard=True, **looping(nano[1], thinking=False))
    assert result.finish_reason == "loop" and 200 < len(result.tokens) < 300 and result.text


@pytest.mark.full
def test_a_guarded_loop_ends_thinking_and_then_the_answer(nano):
    result = generate(*nano, QUESTION, loop_guard=True, **looping(nano[1], thinking=True))
    assert result.reasoning.endswith(SENTENCE.strip()) and result.text and result.finish_reason == "loop"


def test_an_ordinary_answer_has_no_loop(nano):
    assert generate(*nano, QUESTION, temp=0).loop is None


# --- silence ----------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_empty_since_thinking_took_all_is_warned_of(nano):
    with pytest.warns(EmptyAnswer):
        assert generate(*nano, QUESTION, temp=0, max_tokens=5).text == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(*nano, QUESTION, temp=0).text
