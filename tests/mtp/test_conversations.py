"""Conversations with drafts: each turn as without, the draft head's memory where the model's is."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import Model, Processor, generate, load, stream_generate
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.conversation import Conversation, Turn
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.media import encode_media
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.prompt.prompt import Prompt

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
SHAPES, TRIANGLE, MOVING = (PICTURES / name for name in ("shapes.png", "triangle.png", "moving.mp4"))
TURNS = [
    [{"type": "image", "image": TRIANGLE}, {"type": "text", "text": "What shape is it?"}],
    "And what colour is it?",
    "What is 34 + 58?",
    [{"type": "video", "video": MOVING}, {"type": "text", "text": "Which way does the circle move?"}],
    [{"type": "image", "image": SHAPES}, {"type": "text", "text": "What do you see?"}],
]
QUESTIONS = ["What is 34 + 58?", "Who are you?", "What is 12 + 9?"]


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


def said(conversation: Conversation, content: Any) -> Turn:
    turn = conversation.send(content)
    for _ in turn:
        pass
    return turn


def memory(drafts: DraftFollower) -> np.ndarray:
    """Keys and values of the pairs that were read: (pairs, ...)."""
    arrays = drafts.cache.arrays()
    return np.concatenate([np.array(arrays[f"layers.0.{name}"][0]) for name in ("keys", "values")]).swapaxes(0, 1)


def fresh(model: Model, row: PromptRow) -> DraftFollower:
    """The head's side of a cache that reads all at once."""
    cache = model.make_cache()
    cache.follower = DraftFollower(model, cache.row_lengths)
    prefill(model, cache, row, 512)
    return cache.follower


def assert_same_memory(model: Model, drafts: DraftFollower, row: PromptRow) -> None:
    """The head has read the pairs of these tokens, all and no others, and waits with the same hidden state."""
    known = fresh(model, row)
    drafts.flush(model)
    assert drafts.followed == known.followed
    np.testing.assert_allclose(memory(drafts), memory(known), atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.array(drafts.hidden), np.array(known.hidden), atol=1e-4, rtol=0)
    assert following(drafts) == following(known)


def following(drafts: DraftFollower) -> list[list[int]]:
    """(3, B): where the next pair stands."""
    if drafts.position is None:
        return [drafts.cache.next_positions] * 3
    return drafts.position.tolist()


def model_has_read(conversation: Conversation, turn: Turn) -> PromptRow:
    """The last prompt and the answer, as far as the model has read them."""
    messages = conversation.messages[:-1]
    prompt = conversation.processor.encode_messages(messages, conversation.vision, **conversation._template)
    whole = prompt.tokens + turn.result.tokens
    return encode_media(conversation.model, Prompt(whole[: conversation.cache.length], False, prompt.media))


# --- turns -----------------------------------------------------------------------------------------------------------


FULL = pytest.mark.full


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("thinking", "depth"),
    [(False, 1), (True, 3), *(pytest.param(*case, marks=FULL) for case in ((False, 2), (False, 3), (True, 1)))],
)
def test_turns_are_answered_alike_with_drafts(nano, thinking, depth):
    options = {"enable_thinking": thinking, "temp": 0.9, "seed": 2}
    plain = Conversation(*nano, mtp="off", **options)
    drafted = Conversation(*nano, mtp="on", mtp_depth=depth, **options)
    for content in TURNS:
        found, want = said(drafted, content), said(plain, content)
        assert found.result.tokens == want.result.tokens and found.result.mtp.drafted
        assert drafted.cache.row_lengths == plain.cache.row_lengths and found.reused == want.reused


@pytest.mark.full
def test_the_head_has_read_each_turn_whole(nano):
    conversation = Conversation(*nano, enable_thinking=False, mtp="on", mtp_depth=2, temp=0)
    for content in TURNS:
        turn = said(conversation, content)
        drafts = conversation.cache.follower
        assert list(drafts.followed) == conversation.cache.row_lengths
        assert_same_memory(nano[0], drafts, model_has_read(conversation, turn))


def test_the_head_goes_back_with_the_model(nano):
    conversation = Conversation(*nano, enable_thinking=False, mtp="on", mtp_depth=3, temp=0)
    for content in TURNS:
        said(conversation, content)
        newest = conversation.entries[-1]
        conversation.cache.restore(newest.snapshot)
        drafts = conversation.cache.follower
        assert list(drafts.followed) == conversation.cache.row_lengths == [len(newest.prefix)]
        prompt = conversation.processor.encode_messages(
            conversation.messages[:-1], conversation.vision, add_generation_prompt=False, **conversation._template
        )
        assert len(prompt.tokens) == len(newest.prefix)
        assert_same_memory(nano[0], drafts, encode_media(nano[0], prompt))


def test_the_head_goes_back_to_a_place_that_another_branch_has_overwritten(nano):
    model, _ = nano
    start, first, second = [[20 + (7 * i + j) % 900 for i in range(12)] for j in range(3)]
    cache = model.make_cache()
    cache.follower = DraftFollower(model, [0])
    prefill(model, cache, PromptRow(start), 5)
    before = cache.snapshot()
    prefill(model, cache, PromptRow(first), 5)
    after = cache.snapshot()
    cache.restore(before)
    prefill(model, cache, PromptRow(second), 5)
    assert_same_memory(model, cache.follower, PromptRow(start + second))
    cache.restore(after)
    assert_same_memory(model, cache.follower, PromptRow(start + first))
    cache.restore(before)
    assert_same_memory(model, cache.follower, PromptRow(start))


def test_a_turn_that_was_stopped_early_leaves_the_head_where_the_model_is(nano):
    conversation = Conversation(*nano, mtp="on", mtp_depth=3, temp=0)
    for taken in (1, 2, 5):
        turn = conversation.send(TURNS[0])
        for _ in itertools.islice(turn, taken):
            pass
        turn.cancel()
        drafts = conversation.cache.follower
        assert list(drafts.followed) == conversation.cache.row_lengths
        assert turn.result.finish_reason == "interrupted"
        assert_same_memory(nano[0], drafts, model_has_read(conversation, turn))


# --- off and on again ------------------------------------------------------------------------------------------------


def test_drafts_may_be_off_for_a_turn_and_on_again(nano):
    options = {"enable_thinking": False, "temp": 0.9, "seed": 2}
    plain, mixed = Conversation(*nano, mtp="off", **options), Conversation(*nano, mtp="on", **options)
    gap = 0
    for content, mode in zip(TURNS, ("on", "off", "on", "on", "off"), strict=True):
        mixed.change(mtp=mode)
        turn = said(mixed, content)
        assert turn.result.tokens == said(plain, content).result.tokens
        assert bool(turn.result.mtp.drafted) == (mode == "on")
        drafts, length = mixed.cache.follower, mixed.cache.row_lengths[0]
        if mode == "off":
            assert drafts is None
            gap = len(mixed.entries[-1].prefix)
            continue
        assert drafts.followed == (length,)
        drafts.flush(mixed.model)
        assert drafts.cache.row_lengths == [length - 1 - gap]
        assert following(drafts) == [[position - 1] for position in mixed.cache.next_positions * 3]


def test_a_head_that_starts_anew_reads_the_rest_of_the_text_at_its_positions(nano):
    """Keys of pairs behind a gap are those of the pairs of the whole text."""
    model, _ = nano
    conversation = Conversation(*nano, enable_thinking=False, mtp="off", temp=0)
    said(conversation, TURNS[0])
    said(conversation, TURNS[1])
    conversation.change(mtp="on")
    turn = said(conversation, TURNS[2])
    drafts = conversation.cache.follower
    drafts.flush(model)
    late, whole = memory(drafts), memory(fresh(model, model_has_read(conversation, turn)))
    assert 0 < len(late) < len(whole)
    np.testing.assert_allclose(late, whole[-len(late) :], atol=1e-4, rtol=0)


# --- cache= ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [("on", "on", "on"), ("on", "off", "on"), ("off", "on", "off")], ids=" ".join)
def test_a_text_goes_on_in_a_cache_alike_with_drafts(nano, modes):
    options = {"temp": 0.9, "seed": 5, "max_tokens": 9}
    plain, mixed = nano[0].make_cache(), nano[0].make_cache()
    for question, mode in zip(QUESTIONS, modes, strict=True):
        want = generate(*nano, question, cache=plain, mtp="off", **options)
        found = generate(*nano, question, cache=mixed, mtp=mode, **options)
        assert found.tokens == want.tokens
        assert mixed.row_lengths == plain.row_lengths and mixed.next_positions == plain.next_positions
        assert mixed.follower is None if mode == "off" else list(mixed.follower.followed) == mixed.row_lengths


def test_a_head_that_the_model_left_behind_starts_anew(nano):
    cache = nano[0].make_cache()
    options = {"cache": cache, "mtp": "on", "temp": 0, "max_tokens": 5}
    generate(*nano, QUESTIONS[0], **options)
    nano[0].hidden(mx.array([[30, 31, 32]]), cache)  # as a caller may
    before = cache.follower
    generate(*nano, QUESTIONS[1], **options)
    assert cache.follower is not before and list(cache.follower.followed) == cache.row_lengths


def test_the_head_follows_a_text_that_goes_on_in_a_cache(nano):
    model, processor = nano
    cache, tokens = model.make_cache(), ()
    for question in QUESTIONS:
        result = generate(*nano, question, cache=cache, mtp="on", mtp_depth=3, temp=0, max_tokens=9)
        prompt = processor.encode_messages([{"role": "user", "content": question}]).tokens
        tokens = (tokens + prompt + result.tokens)[: cache.row_lengths[0]]
        assert_same_memory(model, cache.follower, PromptRow(tokens))


# --- several at once -------------------------------------------------------------------------------------------------


def in_turn(*streams: Iterator[Any]) -> list[str]:
    """The texts of several generations that are advanced by one piece each, in turn."""
    texts = [""] * len(streams)
    for pieces in itertools.zip_longest(*streams):
        texts = [text + str(piece or "") for text, piece in zip(texts, pieces, strict=True)]
    return texts


@pytest.mark.parametrize("depths", [(1, 3), pytest.param((2, 2), marks=FULL), (3, None)])
def test_generations_that_take_turns_give_what_each_gives_alone(nano, depths):
    asked = []
    for question, depth, image in zip(QUESTIONS, depths, ([], [SHAPES]), strict=False):
        mode = {"mtp": "on", "mtp_depth": depth} if depth else {"mtp": "off"}
        asked.append(({"prompt": question, "images": image, "temp": 1.0, "max_tokens": 12}, mode))
    alone = ["".join(map(str, stream_generate(*nano, seed=3, mtp="off", **options))) for options, _ in asked]
    together = in_turn(*(stream_generate(*nano, seed=3, **options, **mode) for options, mode in asked))
    assert together == alone and all(alone)


def test_conversations_that_take_turns_give_what_each_gives_alone(nano):
    options = {"temp": 0.9, "seed": 2, "enable_thinking": False, "max_tokens": 12}
    alone = [Conversation(*nano, mtp="off", **options) for _ in range(2)]
    turns = TURNS[:3], TURNS[2:]
    want = [[said(one, content).result.tokens for content in own] for one, own in zip(alone, turns, strict=True)]
    both = [Conversation(*nano, mtp="on", mtp_depth=depth, **options) for depth in (2, 3)]
    found: list[list[tuple[int, ...]]] = [[], []]
    for contents in zip(*turns, strict=True):
        sent = [one.send(content) for one, content in zip(both, contents, strict=True)]
        in_turn(*map(iter, sent))
        for one, turn, answers in zip(both, sent, found, strict=True):
            answers.append(turn.result.tokens)
            assert list(one.cache.follower.followed) == one.cache.row_lengths
    assert found == want


def test_caches_share_no_memory_of_the_head(nano):
    model, _ = nano
    first: Cache = model.make_cache()
    first.follower = DraftFollower(model, [0])
    prefill(model, first, PromptRow(range(20, 40)), 512)
    before = memory(first.follower)
    fresh(model, PromptRow(range(50, 90)))
    assert np.array_equal(memory(first.follower), before)
