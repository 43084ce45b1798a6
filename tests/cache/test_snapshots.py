"""Snapshots are values: whatever branches are written, restored elsewhere or dropped, each holds what it held."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from memory_use import active
from refusing import refused

from mlx_qwen35.budget.plan import kv_bytes, state_bytes
from mlx_qwen35.cache.cache import Cache, Snapshot
from mlx_qwen35.cache.layer import KVCache
from mlx_qwen35.checkpoint.config import FULL
from mlx_qwen35.model.model import Model

SAME = 2e-5  # of logits, where products of other shapes sum in another order


@pytest.fixture(scope="module")
def model(text_model) -> Model:
    return text_model()


@dataclass(frozen=True)
class Pass:
    """A forward pass, and how many of its tokens were kept."""

    tokens: tuple[int, ...]
    stepwise: bool = False
    kept: int = 0  # of a stepwise pass


History = tuple[Pass, ...]


def feed(model: Model, cache: Cache, one: Pass) -> None:
    position = cache.position
    mx.eval(model.hidden(mx.array([one.tokens]), cache, stepwise=one.stepwise), cache.held())
    if one.stepwise:
        cache.rollback(position, [one.kept])


def replayed(model: Model, history: History) -> Cache:
    cache = model.make_cache()
    for one in history:
        feed(model, cache, one)
    return cache


def tokens_of(history: History) -> list[int]:
    return [t for one in history for t in (one.tokens[: one.kept] if one.stepwise else one.tokens)]


def assert_holds(model: Model, cache: Cache, history: History) -> None:
    """The cache has the very bits of one that went through the same passes, and continues like a cold prefill."""
    clean = replayed(model, history)
    assert cache.row_lengths == clean.row_lengths == [len(tokens_of(history))]
    for name, array in clean.arrays().items():
        assert np.array(array).tobytes() == np.array(cache.arrays()[name]).tobytes(), name
    follow = mx.array([[7]])
    warm = model(follow, cache.copy())[0, -1]
    cold = model(mx.array([[*tokens_of(history), 7]]))[0, -1]
    assert float(mx.abs(warm - cold).max()) < SAME


class World:
    """Caches and snapshots of one model, and the history of each."""

    def __init__(self, model: Model, seed: int):
        self.model, self.rng = model, np.random.default_rng(seed)
        self.caches: list[tuple[Cache, History]] = [(model.make_cache(), ())]
        self.snapshots: list[tuple[Snapshot, History]] = []

    def pick(self, many: list) -> int:
        return int(self.rng.integers(len(many)))

    def append(self) -> None:
        i = self.pick(self.caches)
        cache, history = self.caches[i]
        one = Pass(tuple(self.rng.integers(0, 1000, self.rng.choice([1, 1, 2, 5, 60, 300])).tolist()))
        feed(self.model, cache, one)
        self.caches[i] = cache, (*history, one)

    def rollback(self) -> None:
        i = self.pick(self.caches)
        cache, history = self.caches[i]
        tokens = tuple(self.rng.integers(0, 1000, self.rng.integers(2, 5)).tolist())
        one = Pass(tokens, True, int(self.rng.integers(1, len(tokens) + 1)))
        feed(self.model, cache, one)
        self.caches[i] = cache, (*history, one)

    def snapshot(self) -> None:
        cache, history = self.caches[self.pick(self.caches)]
        self.snapshots.append((cache.snapshot(), history))

    def restore(self) -> None:
        if self.snapshots:
            snapshot, history = self.snapshots[self.pick(self.snapshots)]
            i = self.pick(self.caches)
            self.caches[i][0].restore(snapshot)
            self.caches[i] = self.caches[i][0], history

    def branch(self) -> None:
        cache, history = self.caches[self.pick(self.caches)]
        self.caches.append((cache.copy(), history))

    def compact(self) -> None:
        self.caches[self.pick(self.caches)][0].compact()

    def move(self) -> None:
        """Through the arrays, as to disk and back."""
        i = self.pick(self.caches)
        cache, history = self.caches[i]
        if history:
            fresh = self.model.make_cache()
            fresh.layers = [type(layer).from_state(layer.state()) for layer in cache.layers]
            fresh.position = cache.position
            self.caches[i] = fresh, history

    def drop(self) -> None:
        if self.snapshots and self.rng.random() < 0.5:
            del self.snapshots[self.pick(self.snapshots)]
        elif len(self.caches) > 1:
            del self.caches[self.pick(self.caches)]

    def check(self) -> None:
        for cache, history in self.caches:
            assert_holds(self.model, cache, history)
        for snapshot, history in self.snapshots:
            cache = self.model.make_cache()
            cache.restore(snapshot)
            assert_holds(self.model, cache, history)


OPERATIONS = ("append", "append", "append", "rollback", "snapshot", "restore", "branch", "compact", "move", "drop")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 40))])
def test_every_cache_and_snapshot_holds_what_it_held(model, seed):
    world = World(model, seed)
    for _ in range(12):
        getattr(world, str(world.rng.choice(OPERATIONS)))()
    world.check()


def test_a_snapshot_is_restored_into_another_cache_after_its_own_is_gone(model):
    cache = model.make_cache()
    history = (Pass(tuple(range(40))), Pass((3,)))
    for one in history:
        feed(model, cache, one)
    snapshot = cache.snapshot()
    feed(model, cache, Pass((5, 6)))
    del cache
    other = model.make_cache()
    feed(model, other, Pass((1, 2, 3)))
    other.restore(snapshot)
    assert_holds(model, other, history)


def test_a_snapshot_of_another_model_s_cache_is_refused(model, text_model):
    other = text_model(dtype=mx.float16).make_cache()
    with refused("snapshot_foreign"):
        other.restore(model.make_cache().snapshot())
    with refused("snapshot_foreign", "2"):
        model.make_cache(2).restore(model.make_cache().snapshot())


def test_rows_made_of_one_cache_go_on_apart(model):
    """As for several answers to one prompt."""
    cache, history = model.make_cache(), (Pass(tuple(range(40))),)
    feed(model, cache, history[0])
    for several in (cache.select([0, 0, 0]), Cache.joined([cache, cache.copy(), cache])):
        for token in (7, 90):
            logits = model(mx.array([[token], [token + 1], [token + 2]]), several)
            mx.eval(logits)
        for row in range(3):
            own = replayed(model, (*history, Pass((7 + row,))))
            assert float(mx.abs(model(mx.array([[90 + row]]), own)[0] - logits[row]).max()) < SAME
    assert_holds(model, cache, history)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_going_on_behind_a_snapshot_copies_nothing(model):
    cache = model.make_cache()
    feed(model, cache, Pass(tuple(range(300))))
    before = active()
    snapshot = cache.snapshot()
    assert active() == before
    feed(model, cache, Pass((1,)))
    assert active() - before <= state_bytes(model.config, 4) + 65536  # the snapshot's states, and no keys
    assert snapshot.row_lengths == [300]


@pytest.mark.full
def test_branches_share_columns_until_they_write_and_then_hold_one_copy_each(model):
    config, count = model.config, 5
    cache = model.make_cache()
    feed(model, cache, Pass(tuple(i % 1000 for i in range(300))))
    before = active()
    branches = [cache.copy() for _ in range(count)]
    assert active() == before
    for i, branch in enumerate(branches):
        feed(model, branch, Pass((i,)))
    own = kv_bytes(config, 301, 4) + state_bytes(config, 4)
    assert (count - 1) * own <= active() - before <= count * own + 4096 * count  # the first writes in place
    for i, branch in enumerate(branches):
        feed(model, branch, Pass((i,)))
    assert active() - before <= count * own + 4096 * count
    del branches, branch
    assert active() - before <= own


def test_a_cache_grows_by_holding_no_more_than_one_array_twice(model):
    config, columns = replace(model.config, layer_types=(FULL,) * 6), 8 * KVCache.STEP
    cache = Cache(config, mx.float32)
    cache.reserve(columns)
    half = mx.zeros((1, config.num_key_value_heads, columns // 2, config.head_dim))
    for layer in cache.layers * 2:
        layer.append(half, half, [columns // 2])
    cache.evaluate()
    del half
    before = active()
    mx.reset_peak_memory()
    cache.reserve(1)
    cache.evaluate()
    more, array = kv_bytes(config, KVCache.STEP, 4), kv_bytes(config, columns, 4) // 12
    assert active() - before == more
    assert mx.get_peak_memory() - before <= more + array + more // 12 + 4096  # and the empty columns of one array


def test_a_cache_without_room_left_gives_it_back(model):
    cache = model.make_cache()
    cache.reserve(10 * KVCache.STEP)
    feed(model, cache, Pass((1, 2, 3)))
    cache.compact()
    assert cache.nbytes == kv_bytes(model.config, 3, 4) + state_bytes(model.config, 4)
    assert_holds(model, cache, (Pass((1, 2, 3)),))
