"""A library beside what runs: it shortens no answer, and a batch that shares a beginning keeps to the limit."""

import mlx.core as mx
import numpy as np
import pytest
from memory_use import active
from refusing import refused

from mlx_qwen35 import Conversation, load
from mlx_qwen35.cache.layer import CachePosition, KVCache
from mlx_qwen35.cache.prefix import SYSTEM, TURN
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.engine.encode import prefix_of
from mlx_qwen35.engine.generation import start
from mlx_qwen35.errors import InputError

ASK, COLUMNS = "What is 34 + 58?", 20_000


@pytest.fixture(scope="module")
def loaded():
    return load("nano")


@pytest.fixture
def nano(loaded, monkeypatch):
    monkeypatch.setattr(loaded[0], "memory_limit", loaded[0].memory_limit)  # each test begins with it
    return loaded


def fill(model, library, count: int = 100) -> None:
    """Store prompts that nobody uses."""
    cache = model.make_cache()
    model(mx.array([[5, 6]]), cache)
    for token in range(count):
        library.store(Prefix(np.array([20 + token, 6], np.int32)), cache.snapshot(), SYSTEM)


@pytest.mark.parametrize("room", [21e6, 30e6])
def test_an_answer_and_its_drafts_are_as_long_with_idle_snapshots_as_without(nano, room):
    model, library = nano[0], nano[0].make_library()
    model.memory_limit = int(active() + room)

    def planned(**options) -> tuple:
        request = start(*nano, [ASK], prefill_step_size=64, **options).requests[0]
        return request.limit, request.limited_by, request.drafts.policy

    alone = planned()
    fill(model, library)
    assert planned() != alone
    assert planned(library=library) == alone and not library.entries()


def test_what_is_idle_stays_where_memory_shortens_nothing(nano):
    library = nano[0].make_library()
    fill(nano[0], library)
    start(*nano, [ASK], library=library)
    assert len(library.entries()) == 100


def test_a_batch_that_goes_on_from_one_snapshot_keeps_to_the_limit(nano):
    model, library = nano[0], nano[0].make_library()
    cache = model.make_cache()
    for layer in cache.layers:
        if isinstance(layer, KVCache):
            layer.reserve([COLUMNS])
            layer.rows[0].length = COLUMNS
    cache.position = CachePosition((COLUMNS,), (COLUMNS,))
    library.store(Prefix(np.full(COLUMNS, 20, np.int32)), cache.snapshot(), TURN)
    del cache, layer
    before, prompts = active(), [[20] * COLUMNS + [30 + row, 7] for row in range(4)]

    def taken(room: float):
        model.memory_limit = int(before + room)
        try:
            return start(*nano, prompts, library=library, max_tokens=1, temp=0, mtp="off", prefill_step_size=64)
        except InputError:
            return None

    low, high = 0.0, 1e9
    while high - low > 1e6:
        middle = (low + high) / 2
        low, high = (low, middle) if taken(middle) else (middle, high)
    begun = [library.begin(prefix_of(request.prompt)) for request in taken(high).requests]
    (entry,) = library.entries()
    assert len(begun) == 4 and before < active() <= model.memory_limit < before + 4 * entry.snapshot.nbytes


def test_a_turn_that_memory_refuses_leaves_what_was_read(nano):
    model = nano[0]
    conversation = Conversation(*nano, max_tokens=4, temp=0, library=model.make_library(0))
    assert list(conversation.send(ASK))
    entries, limit, model.memory_limit = conversation.entries, model.memory_limit, 1
    with refused("memory_exceeded"):
        list(conversation.send("Who are you?"))
    model.memory_limit = limit
    conversation.library.trim()
    assert entries and conversation.entries == entries and len(conversation.messages) == 2
    turn = conversation.send("Who are you?")
    assert list(turn) and turn.reused == len(entries[-1].prefix)
