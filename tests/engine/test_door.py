"""What a sequence may go on with: masks as bits, and the door that puts thinking, its end and the answer in order."""

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35.backend import METAL, assume
from mlx_qwen35.engine.constraints.bits import all_but, holds, only, packed, restricted
from mlx_qwen35.engine.constraints.door import FAR, Door, Thinking, ToolTags

V = 70
OPEN, CLOSE, CALL, CALL_END, BLANK = 60, 61, 62, 63, 64
WORDS = {1: "<function=", 2: "f>", 3: " prose", 4: "\n"}
MOST = 40
CLOSING = (50, 51, CLOSE, BLANK)
TAGS = ToolTags(CALL, CALL_END, lambda tokens: "".join(WORDS.get(token, "?") for token in tokens))


class Counting:
    """An answer whose k-th token is k modulo 40."""

    def __init__(self) -> None:
        self.taken = 0

    def mask(self) -> np.ndarray:
        return only([self.taken % 40], V)

    def accept(self, token: int) -> None:
        assert token == self.taken % 40
        self.taken += 1

    def rollback(self, count: int) -> None:
        self.taken -= count
        assert self.taken >= 0


def door(budget=3, answer=None, guard=False, tools=None, inside=True) -> Door:
    rules = Thinking(OPEN, CLOSE, budget, MOST, CLOSING, (CLOSE, BLANK), (BLANK,), guard, tools)
    return Door(V, stops={69}, thinking=rules, inside=inside, answer=answer)


def allowed(door: Door) -> set[int]:
    bits = door.bits()
    return set(range(V)) if bits is None else {token for token in range(V) if holds(bits, token)}


def feed(door: Door, *tokens: int) -> Door:
    for token in tokens:
        assert token in allowed(door), (token, allowed(door))
        door.accept(token)
    return door


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 64, 70])
def test_bits_hold_what_they_were_made_of(vocabulary):
    mask = np.random.default_rng(vocabulary).random(vocabulary) < 0.5
    bits = packed(mask, vocabulary)
    assert [holds(bits, token) for token in range(vocabulary)] == mask.tolist()
    assert packed(bits, vocabulary).tolist() == bits.tolist()
    tokens = np.flatnonzero(mask).tolist()
    assert only(tokens, vocabulary).tolist() == bits.tolist()
    outside = [token for token in range(vocabulary) if not mask[token]]
    assert all_but(outside, vocabulary).tolist() == bits.tolist()


def test_a_mask_that_is_too_short_forbids_the_rest_and_one_that_is_too_long_is_cut():
    assert packed(np.ones(33, bool), V).tolist() == only(range(33), V).tolist()
    assert packed(np.ones(500, bool), V).tolist() == only(range(V), V).tolist()
    assert packed(np.full(9, 0xFFFFFFFF, np.uint32), V).tolist() == only(range(V), V).tolist()


@pytest.mark.parametrize("mask", [[1, 2], np.ones((2, 3), bool), np.ones(3, np.int32), None])
def test_a_mask_of_another_kind_is_refused(mask):
    with refused("option_invalid", "constraint"):
        packed(mask, V)


@pytest.mark.parametrize("width", [64, 70, 96])
@pytest.mark.parametrize("compiles", [False, True])
def test_logits_outside_the_sets_are_minus_infinity(width, compiles):
    """Both ways: as the CPU does it, and the operations that become one launch on a GPU."""
    rng = np.random.default_rng(3)
    logits, masks = rng.normal(size=(3, width)).astype(np.float32), rng.random((2, 64)) < 0.5
    mx.disable_compile()  # it would start a C++ compiler of the system
    try:
        with assume(METAL) if compiles else assume(None):
            got = np.array(restricted(mx.array(logits), [packed(masks[0], 64), None, packed(masks[1], 64)]))
    finally:
        mx.enable_compile()
    expected = logits.copy()
    for row, mask in ((0, masks[0]), (2, masks[1])):
        expected[row, :64][~mask] = -np.inf
        expected[row, 64:] = -np.inf
    assert got.tolist() == expected.tolist()


# --- the end of thinking ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 7])
def test_at_the_budget_the_closing_comes_and_then_anything(budget):
    found = feed(door(budget), *[5] * budget)
    for token in CLOSING:
        assert allowed(found) == {token}
        found.accept(token)
    assert allowed(found) == set(range(V))


def test_a_budget_of_nothing_closes_at_once_without_a_sentence():
    found = feed(door(0), CLOSE, BLANK)
    assert allowed(found) == set(range(V))


def test_thinking_that_ends_by_itself_is_left_alone():
    found = feed(door(3), 5, CLOSE, 5, 5, 5, 5, 5)
    assert allowed(found) == set(range(V))


def test_thinking_that_an_answer_opens_again_is_closed_again():
    found = feed(door(3), 5, 5, CLOSE, OPEN, *[5] * 8)
    assert allowed(found) == {CLOSING[0]}


def test_the_answer_begins_behind_the_blank_line_and_not_before():
    found = feed(door(2, Counting()), 5)
    assert 69 not in allowed(found), "an end token would leave no answer"
    feed(found, CLOSE)
    assert allowed(found) == {BLANK}
    feed(found, BLANK, 0, 1)
    assert allowed(found) == {2}


def test_the_answer_begins_behind_a_closing_too():
    found = feed(door(1, Counting()), 5, *CLOSING)
    assert allowed(found) == {0}


def test_without_thinking_the_answer_begins_at_once():
    assert allowed(feed(door(answer=Counting(), inside=False), 0)) == {1}


@pytest.mark.parametrize("call", [(CALL, 4, 1, 2), (CALL, 1, 2)])
def test_a_call_inside_thinking_is_not_cut_and_ends_the_count_when_it_is_whole(call):
    found = feed(door(3, tools=TAGS), 5, *call, 5, 5, 5)
    assert allowed(found) == set(range(V))
    feed(found, CALL_END, 4)
    assert allowed(found) == set(range(V)), "the answer may end here"
    feed(found, 5)
    assert allowed(found) == {CLOSING[0]}, "it was a draft: thinking goes on, and its budget is spent"


def test_a_call_inside_thinking_that_never_ends_is_closed_where_the_answer_needs_its_room():
    found = feed(door(3, tools=TAGS), CALL, 1, 2, *[5] * (MOST - 3))
    assert allowed(found) == {CLOSING[0]}


def test_a_tag_in_prose_is_no_call():
    found = feed(door(3, tools=TAGS), CALL, 3, 5)
    assert allowed(found) == {CLOSING[0]}


def test_a_closing_tag_alone_is_no_call():
    assert allowed(feed(door(3, tools=TAGS), 5, 5, CALL_END)) == {CLOSING[0]}


def test_without_tools_a_call_inside_thinking_is_thinking():
    assert allowed(feed(door(3), CALL, 1, 2)) == {CLOSING[0]}


def test_a_loop_closes_thinking_where_the_guard_is_on():
    free, guarded = door(None), door(None, guard=True)
    for token in [5, 6] * 200:
        free.accept(token)
        if len(allowed(guarded)) == V:
            guarded.accept(token)
    assert allowed(guarded) == {CLOSING[0]} and allowed(free) == set(range(V))


# --- undoing, and what is free ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_what_was_undone_never_was(seed):
    """Random tokens, taken back now and then, against a door that sees only those that stay."""
    rng, make = np.random.default_rng(seed), lambda: door(4, [None, Counting()][seed % 2], tools=TAGS)
    found, kept = make(), []
    for _ in range(60):
        token = int(rng.choice(sorted(allowed(found) - {69})))
        found.accept(token)
        kept.append(token)
        if rng.random() < 0.4:
            count = int(rng.integers(1, min(4, len(kept)) + 1))
            found.rollback(count)
            del kept[len(kept) - count :]
        assert allowed(found) == allowed(feed(make(), *kept))


@pytest.mark.parametrize("seed", range(20))
def test_tokens_that_are_said_to_be_free_are_free_whatever_they_are(seed):
    rng, found = np.random.default_rng(seed), door(12, tools=TAGS)
    for _ in range(80):
        for ahead in range(min(found.free, 4)):
            assert len(allowed(found)) == V
            found.accept(int(rng.choice([5, 4, OPEN, CLOSE, CALL, CALL_END])))
            ahead += 1
        token = int(rng.choice(sorted(allowed(found))))
        found.accept(token)


def test_where_nothing_can_come_everything_is_free():
    assert door(None).free == FAR and door(5).free == 5
    assert door(5, Counting()).free == door(None, guard=True).free == 0
