"""Rows of several adapters and of none in one batch: each gets what it gets alone, bit for bit in float32."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from adapters.random_adapters import every_map, made
from engine.schedules import check
from mtp.drafting import SMALL, load_small
from refusing import refused

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.kv_format import KVFormat
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.names import HEAD, MTP, TEXT
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.model.lora import AdapterSet
from mlx_qwen35.model.model import Model

NAMES = ("", "a", "b", "few")
ROWS = ("a", "", "b", "a", "few")  # of a batch


@pytest.fixture(scope="module")
def models(checkpoint_folder, tmp_path_factory) -> Callable[..., Model]:
    """(bits of weights = None) -> a small model with three adapters: of ranks 4, 2 to 5, and 3 of some maps."""
    raw, written = checkpoint_folder(SMALL), {}

    def model(bits: int | None = None) -> Model:
        if bits not in written:
            own = load_small(raw, tmp_path_factory.mktemp("batches") / "model", bits)
            maps = every_map(open_checkpoint(raw), TEXT, HEAD, MTP)
            own.adapters.add("a", made(maps, 1))
            own.adapters.add("b", made(maps, 2, (2, 5)))
            own.adapters.add("few", made(maps, 3, (3,), only=lambda name: "q_proj" in name))
            written[bits] = own
        return written[bits]

    return model


def prompt(row: int, length: int = 9) -> list[int]:
    return np.random.default_rng(row).integers(0, 250, length).tolist()


def read(model: Model, name: str, row: int, chunk: int = 1024) -> Cache:
    """A cache that has read the prompt of a row with this adapter."""
    cache = model.make_cache(adapter=name or "base")
    prefill(model, cache, PromptRow(prompt(row, 5 + 3 * row)), chunk)
    return cache


def logits(model: Model, tokens: mx.array, cache: Cache, lengths: list[int] | None = None) -> mx.array:
    return model.logits(model.hidden(tokens, cache, lengths), model.active(cache))


@pytest.mark.core(2)
@pytest.mark.parametrize("form", ["16", "8", "4"])
@pytest.mark.parametrize("bits", [None, 4])
def test_each_row_of_a_mixed_batch_has_the_bits_that_it_has_alone(models, bits, form):
    model = models(bits)
    kv, model.kv = model.kv, KVFormat.of(None if form == "16" else form)
    try:
        alone = [read(model, name, row) for row, name in enumerate(ROWS)]
        batch = Cache.joined([cache.copy() for cache in alone])
        assert batch.adapters == ROWS
        for step in range(3):
            tokens = mx.array([[(7 * row + step) % 250] for row in range(len(ROWS))])
            found = logits(model, tokens, batch)
            for row, cache in enumerate(alone):
                assert mx.array_equal(found[row : row + 1], logits(model, tokens[row : row + 1], cache)), (step, row)
    finally:
        model.kv = kv


def test_rows_of_different_lengths_are_padded_and_none_reaches_another(models):
    """In steps of several tokens, as of drafts, a row alone has products of fewer rows, and other last bits."""
    model, lengths = models(), [4, 1, 3, 0, 2]
    alone = [read(model, name, row) for row, name in enumerate(ROWS)]
    batch = Cache.joined([cache.copy() for cache in alone])
    tokens = mx.array([prompt(50 + row, 4) for row in range(len(ROWS))])
    found = logits(model, tokens, batch, lengths)
    others = mx.where(mx.arange(4) < mx.array(lengths)[:, None], tokens, 0)
    again = logits(model, others, Cache.joined([cache.copy() for cache in alone]), lengths)
    for row, (cache, n) in enumerate(zip(alone, lengths, strict=True)):
        if n:
            own = logits(model, tokens[row : row + 1, :n], cache)
            assert mx.abs(found[row, :n] - own[0]).max().item() < 1e-5
            assert mx.array_equal(found[row, :n], again[row, :n])


def test_a_prompt_in_chunks_is_read_with_its_adapter_throughout(models):
    model, token = models(), mx.array([[3]])
    whole, cut, other = (read(model, name, 4, chunk) for name, chunk in (("a", 1024), ("a", 2), ("b", 1024)))
    whole, cut, other = (logits(model, token, cache) for cache in (whole, cut, other))
    assert mx.abs(whole - cut).max().item() < 1e-4 and mx.abs(whole - other).max().item() > 0.1


@pytest.mark.parametrize(
    "seed", [seed if seed == 7 else pytest.param(seed, marks=pytest.mark.full) for seed in range(60)]
)
def test_a_sequence_in_any_schedule_of_adapters_gets_what_it_gets_alone(models, seed):
    check(models(), seed, NAMES)


def test_the_zeros_behind_a_smaller_rank_add_nothing(models, checkpoint_folder, monkeypatch):
    model, maps = models(), every_map(open_checkpoint(checkpoint_folder(SMALL)), TEXT, HEAD, MTP)
    tokens = mx.array([prompt(1)])
    among = model(tokens, model.make_cache(adapter="a"))
    monkeypatch.setattr(model, "adapters", AdapterSet(model.dtype))
    model.adapters.add("a", made(maps, 1))
    assert mx.array_equal(model(tokens, model.make_cache(adapter="a")), among)


# --- what a cache remembers ------------------------------------------------------------------------------------------


def test_rows_keep_their_adapters_when_caches_are_taken_apart_joined_copied_and_rolled_back(models):
    model = models()
    batch = Cache.joined([read(model, name, row) for row, name in enumerate(ROWS)])
    assert batch.select([4, 0]).adapters == ("few", "a")
    assert Cache.joined([batch, batch.select([1])]).adapters == (*ROWS, "")
    assert batch.copy().adapters == batch.snapshot().cache().adapters == ROWS
    before = batch.position
    model.hidden(mx.array([[1, 2]] * len(ROWS)), batch, stepwise=True)
    batch.rollback(before, [1] * len(ROWS))
    assert batch.adapters == ROWS
    target = model.make_cache(len(ROWS))
    target.assign(batch)
    assert target.adapters == ROWS


def test_what_was_read_with_one_adapter_is_not_restored_for_another(models):
    model = models()
    snapshot = read(model, "a", 1).snapshot()
    for name in ("base", "b"):
        with refused("snapshot_foreign", "adapter a"):
            model.make_cache(adapter=name).restore(snapshot)
    cache = model.make_cache(adapter="a")
    cache.restore(snapshot)
    assert cache.length == 8


def test_a_cache_of_an_adapter_that_is_not_loaded_is_refused(models):
    model = models()
    with refused("adapter_unknown", "base, a, b, few", "gone"):
        model(mx.array([[1]]), Cache(model.config, model.dtype, 1, adapters=("gone",)))


def test_the_draft_heads_cache_has_the_adapters_of_the_models(models):
    model = models()
    batch = Cache.joined([read(model, name, row) for row, name in enumerate(ROWS)])
    follower = DraftFollower(model, batch.row_lengths, batch.adapters)
    assert follower.select([2, 0]).cache.adapters == ("b", "a")
