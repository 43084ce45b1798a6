"""The ranks stay together: caches, signals, errors, and what goes between them."""

import gc
import signal
import threading
import time
import weakref
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from distributed.ranks import Ended, ranks
from refusing import refused

from mlx_qwen35 import Conversation, Processor, generate, load
from mlx_qwen35.cache.kv_format import UNQUANTIZED
from mlx_qwen35.cache.prefix import library_bytes
from mlx_qwen35.checkpoint.config import FULL
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.distributed.deferred import signals_deferred
from mlx_qwen35.distributed.mirror import MirroredCache
from mlx_qwen35.distributed.model import Holding, library_limit
from mlx_qwen35.model.model import Model

SUM, WHO = "What is 34 + 58?", "Who are you?"
PIPELINE = [range(3), range(3, 8)]


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


@pytest.fixture(params=[2, PIPELINE], ids=["tensor", "pipeline"])
def ranked(request):
    with ranks(resolve("nano"), request.param) as found:
        yield found


def alive() -> int:
    """Caches of rank 0 that have a number."""
    gc.collect()
    return sum(type(own) is MirroredCache for own in gc.get_objects())


@pytest.mark.core(1)
def test_other_ranks_have_as_many_caches_as_rank_0_behind_hundreds_of_snapshots(ranked):
    cache, kept = ranked.model.make_cache(), []
    for i in range(600):
        snapshot = cache.snapshot()
        cache.restore(snapshot)
        if i % 250 == 0:
            ranked.model(mx.array([[5 + i % 7]]), cache)
            kept.append(snapshot)
    del snapshot
    assert ranked.counted() == [alive()] * len(ranked.others)
    del kept, cache
    assert ranked.counted() == [alive()] == [1]


@pytest.mark.core(1)
def test_other_ranks_drop_a_cache_that_rank_0_lets_go_of_without_a_further_order(ranked):
    cache = ranked.model.make_cache()
    ranked.model(mx.array([[5]]), cache)
    del cache
    gc.collect()
    until = time.monotonic() + 20
    while any(len(other.caches) > 1 for other in ranked.others) and time.monotonic() < until:
        time.sleep(0.05)
    assert [len(other.caches) for other in ranked.others] == [alive()] == [1]


@pytest.mark.full
def test_conversations_leave_no_cache_on_other_ranks(ranked, nano):
    before = ranked.counted()
    talk = Conversation(ranked.model, nano[1], temp=0, max_tokens=4, enable_thinking=False)
    for _ in range(3):
        talk.send(WHO).text  # noqa: B018
        assert ranked.counted() == [alive()]
    del talk
    assert alive() == 1 and ranked.counted() == before


class Interrupting:
    """Ctrl-C at the collective of this number."""

    def __init__(self, at: int):
        self.left, self.signalled = at, 0

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.signalled += 1
            signal.raise_signal(signal.SIGINT)


@pytest.mark.core(1)
@pytest.mark.parametrize("mtp", ["off", "on"])
@pytest.mark.parametrize("at", [3, 40, 77, 150])
def test_ctrl_c_keeps_the_text_so_far_and_the_conversation_goes_on(ranked, nano, at, mtp):
    if not ranked.between.tensor:
        at //= 18  # sums and gathers of a pass of the tensor split
    talk, said = Conversation(ranked.model, nano[1], temp=0, max_tokens=24, mtp=mtp), []
    turn = talk.send(SUM)
    ranked.between.met = interrupting = Interrupting(max(2, at))
    with pytest.raises(KeyboardInterrupt):
        for piece in turn:
            said.append(piece)
    assert interrupting.signalled == 1 and not ranked.between.reasons
    turn.cancel()
    kept = [dict(message) for message in talk.messages]
    if said:
        assert kept[-1].get("reasoning_content", "") + kept[-1]["content"] in "".join(map(str, said))
    alone = Conversation(*nano, temp=0, max_tokens=24, mtp=mtp)
    alone.messages = [dict(message) for message in kept]
    assert talk.send(WHO).text == alone.send(WHO).text
    assert ranked.counted() == [alive()]


def test_signals_of_a_piece_of_work_come_behind_it():
    done = []
    with pytest.raises(KeyboardInterrupt), signals_deferred():
        with signals_deferred():
            signal.raise_signal(signal.SIGINT)
        done.append("whole")
    assert done == ["whole"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_is_not_lost_where_the_work_fails():
    with pytest.raises(KeyboardInterrupt) as found, signals_deferred():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the work's")
    assert isinstance(found.value.__context__, ValueError)


def test_what_rank_0_refuses_is_no_order(ranked):
    cache, given = ranked.model.make_cache(2), len(ranked.between.given)
    with refused("cache_batch_mismatch"):
        ranked.model.hidden(mx.array([[1]]), cache)
    with refused("lengths_invalid"):
        ranked.model.hidden(mx.array([[1], [2]]), cache, lengths=[2, 1])
    with refused("snapshot_foreign"):
        cache.restore(ranked.model.make_cache().snapshot())
    assert len(ranked.between.given) == given and not ranked.between.reasons


def test_an_error_in_the_middle_of_an_order_ends_every_rank():
    def broken() -> None:
        raise RuntimeError("no memory")

    with ranks(resolve("nano"), 2) as ranked:
        ranked.between.met = broken
        with pytest.raises(Ended, match="no memory"):
            ranked.model(mx.array([[1, 2]]))


def test_an_error_of_another_rank_ends_every_rank():
    with ranks(resolve("nano"), 2) as ranked:
        cache = ranked.model.make_cache()
        ranked.counted()
        ranked.others[0].caches.clear()
        with pytest.raises(Ended):
            ranked.model(mx.array([[1, 2]]), cache)
        assert "KeyError" in ranked.between.reasons[0]


def test_the_first_layer_that_is_not_finite_is_found_on_any_rank(ranked):
    cache = ranked.model.make_cache()
    ranked.model(mx.array([[1, 2]]), cache)
    assert cache.first_not_finite(0) is None
    own = ranked.others[0].caches[cache.number]
    own.layers[-1].rows[0].buffers.arrays["keys"][:] = mx.nan
    mx.eval(own.held())
    assert cache.first_not_finite(0) == 7


@pytest.mark.core(1)
def test_a_decoded_token_is_two_orders_in_the_tensor_split_and_one_in_a_pipeline(ranked, nano):
    given = ranked.between.given
    generate(ranked.model, nano[1], SUM, temp=0, mtp="off", max_tokens=12)
    names = [order.name for order in given[-12:]]
    assert set(names) <= ({"pass", "logits"} if ranked.between.tensor else {"pass"})
    assert all(size < 400 for size in ranked.between.sizes[-12:])


@pytest.mark.full
def test_orders_of_several_threads_come_one_after_the_other(ranked):
    alone = ranked.model(mx.array([[1, 2, 3]]))
    mx.eval(alone)
    found: list[Any] = []

    def run() -> None:
        for _ in range(5):
            logits = ranked.model(mx.array([[1, 2, 3]]))
            found.append(mx.array_equal(logits, alone).item())

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 15 and not ranked.between.reasons


def test_the_rank_with_the_least_memory_bounds_the_chunk(ranked):
    own = ranked.model.chunk(2048)
    ranked.others[0].model.memory_limit = mx.get_active_memory() + 10**6
    assert ranked.model.chunk(2048) == ranked.others[0].model.chunk(2048) < own


def test_budgets_count_what_each_rank_has_of_logits_and_drafts(ranked):
    (first, other), whole = (ranked.model.held, ranked.others[0].model.held), ranked.model.config
    drafts = whole.mtp_num_hidden_layers * whole.num_key_value_heads
    assert first.vocab_size == whole.vocab_size and first.mtp_num_hidden_layers * first.num_key_value_heads == drafts
    assert other.mtp_num_hidden_layers == 0
    assert other.vocab_size == (whole.vocab_size if ranked.between.tensor else 0)


def test_a_library_takes_no_more_on_any_rank_than_that_rank_s_model_would_give_it(nano):
    config, dtype = nano[0].config, mx.float32
    few, many = (replace(config, layer_types=(FULL,) * n) for n in (1, 3))
    limit = 10**10
    alone = library_bytes(limit)
    assert library_limit([Holding(many, limit), Holding(few, limit)], dtype, UNQUANTIZED) == alone
    assert library_limit([Holding(few, limit), Holding(many, limit)], dtype, UNQUANTIZED) == alone // 3
    small = library_limit([Holding(few, limit), Holding(few, limit // 2)], dtype, UNQUANTIZED)
    assert small == library_bytes(limit // 2) < alone


def test_a_model_goes_with_who_held_it(ranked):
    held = weakref.ref(ranked.model.layers[0])
    gc.disable()
    try:
        ranked.model = None
        assert held() is None
    finally:
        gc.enable()
