"""Activations that leave the range of their dtype: where it began is said, and what the caller has stays usable."""

from collections.abc import Collection
from collections.abc import Sequence as Many
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_text_model
from refusing import refused

from mlx_qwen35 import Model, batch_generate, generate, load
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.doctor import probe
from mlx_qwen35.doctor.probe import TEXT, describe, residual_maxima
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import start
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.prompt.prompt import Prompt

ASK = "What is 34 + 58?"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def overflowing(checkpoint_copy) -> Path:
    """Layer 2 adds numbers of about 100,000 to the residual stream; its weights fit into float16."""
    folder = checkpoint_copy(mtp=False, vision=False)
    (file,) = folder.glob("*.safetensors")
    tensors = dict(mx.load(str(file)))
    for name, factor in (("up_proj", 100), ("down_proj", 1e4)):
        path = f"model.language_model.layers.2.mlp.{name}.weight"
        tensors[path] = (factor * tensors[path].astype(mx.float32)).astype(mx.bfloat16)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors, metadata={"format": "pt"})
    return folder


@pytest.fixture
def poison(monkeypatch):
    """From the call of this number on, the head gives NaN; None ends that."""
    logits, calls = Model.logits, []

    def poisoned(self, hidden, *adapters):
        calls.append(hidden.shape)
        return logits(self, hidden, *adapters) * (mx.nan if first is not None and len(calls) >= first else 1)

    first = None

    def set_first(number: int | None) -> None:
        nonlocal first
        first = number
        calls.clear()

    monkeypatch.setattr(Model, "logits", poisoned)
    return set_first


# --- a checkpoint that needs more than float16 -----------------------------------------------------------------------


def test_overflow_in_float16_stops_with_the_layer_that_first_read_it_and_advice(overflowing, nano):
    model = load_text_model(overflowing, mx.float16)
    with refused("logits_not_finite", "3") as stopped:
        generate(model, nano[1], ASK, max_tokens=5)
    assert "Activations left the range of float16" in str(stopped.value)
    assert "dtype='bfloat16'" in str(stopped.value) and "--probe" in str(stopped.value)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_the_advised_dtypes_generate(overflowing, nano, dtype):
    assert len(generate(load_text_model(overflowing, dtype), nano[1], ASK, max_tokens=3).tokens) == 3


def test_the_layer_is_named_in_a_batch_too(overflowing, nano):
    model = load_text_model(overflowing, mx.float16)
    with refused("logits_not_finite", "3"):
        batch_generate(model, nano[1], [ASK, "Hello"], max_tokens=3)


@pytest.mark.full
def test_the_probe_shows_where_the_residual_stream_grows(overflowing, nano):
    tokens = nano[1].encode_text(TEXT).tokens
    maxima = residual_maxima(load_text_model(overflowing), tokens)
    assert len(maxima) == 4 and max(maxima[:2]) < 100 < 65_504 < min(maxima[2:])
    assert "after layer 2" in describe(maxima) and "prefer --dtype bfloat16" in describe(maxima)
    narrow = residual_maxima(load_text_model(overflowing, mx.float16), tokens)
    assert np.isfinite(narrow[:2]).all() and not np.isfinite(narrow[2:]).any()
    assert describe(narrow) == "not finite from layer 2 on: take --dtype bfloat16 or float32"


def test_the_probe_s_maxima_are_those_of_the_stream(text_model, monkeypatch):
    model, seen = text_model(), []
    tokens = [5, 6, 7, 800]
    model.hidden(mx.array([tokens]), pace=lambda arrays: seen.append(np.abs(np.array(arrays[0] + arrays[1])).max()))
    assert residual_maxima(model, tokens) == [float(value) for value in seen]
    monkeypatch.setattr(probe, "CHUNK", 3)
    assert residual_maxima(model, tokens) == pytest.approx([float(value) for value in seen], rel=1e-4)
    assert describe([1.0, 2.0, 0.5]).endswith("0.0031 % of float16's range: float16 has room")


# --- what is looked at -----------------------------------------------------------------------------------------------


BAD = 700


@pytest.fixture
def bad_token(monkeypatch) -> None:
    """The embedding of the token BAD is not finite."""
    embed = Model.embed
    monkeypatch.setattr(
        Model, "embed", lambda *given: mx.where((given[1] == BAD)[..., None], mx.nan, embed(*given))
    )  # fmt: skip


class Script:
    """Chooses these tokens, whatever the logits say."""

    def __init__(self, tokens: Many[int]):
        self.tokens, self.asked = tokens, 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        self.asked += 1
        return mx.array([self.tokens[self.asked - 1]])


def decoded(model: Model, scripts: Many[Script], limits: Many[int], stop_ids: Collection[int] = ()) -> list[Sequence]:
    """Sequences that ran together, with what each was to choose."""
    sequences = [
        Sequence(
            Prompt((5, 6), thinking=False),
            Sampler(Sampling(), 0, 2, 1024, choose=script),
            limit,
            prefill_step_size=64,
            stop_ids=stop_ids,
        )
        for script, limit in zip(scripts, limits, strict=True)
    ]
    engine = Engine(model)
    engine.add(*sequences)
    while not engine.idle:
        engine.step()
    return sequences


@pytest.mark.parametrize(
    ("limit", "stop_ids", "reason"), [(9, {BAD}, "stop"), (2, (), "length")], ids=["stop", "length"]
)
def test_rows_that_have_ended_do_not_matter(nano, bad_token, limit, stop_ids, reason):
    ended, other = decoded(nano[0], [Script([1, BAD, 1, 1]), Script([2] * 9)], [limit, 5], stop_ids)
    assert (ended.tokens, ended.finish_reason, ended.error) == ([1, BAD], reason, None)
    assert (other.tokens, other.finish_reason, other.error) == ([2] * 5, "length", None)


@pytest.mark.parametrize("bad", [0, 1])
def test_the_row_alone_ends_with_the_error(nano, bad_token, bad):
    scripts = [Script([1] * 9), Script([2] * 9)]
    scripts[bad] = Script([3, BAD, *[3] * 9])
    sequences = decoded(nano[0], scripts, [6, 6])
    failed, other = sequences[bad], sequences[1 - bad]
    assert (failed.tokens, failed.finish_reason) == ([3, BAD], "error")
    with refused("logits_not_finite", "0"):
        raise failed.error
    assert (other.tokens, other.finish_reason, other.error) == ([2 - bad] * 6, "length", None)


def test_no_token_is_drawn_from_logits_that_are_not_finite(nano, bad_token):
    script = Script([1, 1, BAD, *[1] * 9])
    (sequence,) = decoded(nano[0], [script], [9])
    with refused("logits_not_finite", "0"):
        raise sequence.error
    assert sequence.tokens == [1, 1, BAD]
    assert script.asked == 5  # the fourth was looked at with the next one under way


def test_a_row_of_a_batch_that_fails_says_so_in_its_result_and_the_others_answer(nano, monkeypatch):
    logits = Model.logits

    def poisoned(self, hidden, *adapters):  # the second row's, in every pass
        poison = mx.where(mx.arange(len(hidden)) == 1, mx.nan, 1).reshape(-1, *[1] * (hidden.ndim - 1))
        return logits(self, hidden, *adapters) * poison

    monkeypatch.setattr(Model, "logits", poisoned)
    good, failed = batch_generate(*nano, [ASK, "Hello"])
    assert (good.text, good.finish_reason, good.error) == ("92", "stop", None)
    assert (len(failed.tokens), failed.finish_reason) == (1, "error")
    with refused("logits_not_finite"):
        raise failed.error


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
def test_any_value_that_is_not_finite_counts(nano, monkeypatch, value):
    logits = Model.logits
    last = mx.arange(1024) == 1023
    monkeypatch.setattr(Model, "logits", lambda self, *given: mx.where(last, value, logits(self, *given)))
    with refused("logits_not_finite"):
        generate(*nano, ASK, max_tokens=3)


# --- where it is in the cache ----------------------------------------------------------------------------------------


def cache_of_two(model):
    caches = [model.make_cache() for _ in range(2)]
    for cache, tokens in zip(caches, (range(5, 25), range(30, 37)), strict=True):
        prefill(model, cache, PromptRow(list(tokens)), 64)
    return Cache.joined(caches)


def test_a_finite_cache_names_no_layer(text_model):
    cache = cache_of_two(text_model())
    assert [cache.first_not_finite(row) for row in (0, 1)] == [None, None]
    assert text_model().make_cache().first_not_finite(0) is None


@pytest.mark.parametrize("value", [mx.nan, mx.inf])
def test_the_first_layer_of_the_row_is_named(text_model, value):
    cache = cache_of_two(text_model())
    states = cache.layers[2].values
    recurrent = mx.array(states.recurrent_state)
    recurrent[1, 0, 0, 0] = value
    cache.layers[2].values = states._replace(recurrent_state=recurrent)
    for row in cache.layers[3].rows:
        row.buffers.arrays["keys"][:, :, 3, 0] = value
    assert [cache.first_not_finite(row) for row in (0, 1)] == [3, 2]


def test_columns_not_yet_in_use_do_not_count(text_model):
    cache = cache_of_two(text_model())
    for row, used in zip(cache.layers[3].rows, (20, 7), strict=True):
        row.buffers.arrays["values"][:, :, used:] = mx.nan
    assert [cache.first_not_finite(row) for row in (0, 1)] == [None, None]
    cache.layers[3].rows[1].buffers.arrays["values"][:, :, 6] = mx.nan
    assert [cache.first_not_finite(row) for row in (0, 1)] == [None, 3]


# --- afterwards ------------------------------------------------------------------------------------------------------


@pytest.mark.core(1)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_caller_s_cache_is_as_it_was_and_goes_on(nano, poison, step):
    model, processor = nano
    cache = model.make_cache()
    prefill(model, cache, PromptRow(processor.encode_text("Hello").tokens), 64)
    before = {name: np.array(array) for name, array in cache.arrays().items()}
    poison(step)
    with refused("logits_not_finite"):
        generate(model, processor, ASK, cache=cache, max_tokens=9)
    poison(None)
    after = cache.arrays()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
    fresh = model.make_cache()
    prefill(model, fresh, PromptRow(processor.encode_text("Hello").tokens), 64)
    assert generate(model, processor, ASK, cache=cache).tokens == generate(model, processor, ASK, cache=fresh).tokens


def test_what_was_said_until_then_is_in_the_results(nano, poison):
    poison(3)
    generation = start(*nano, [ASK])
    with refused("logits_not_finite"):
        for _ in generation:
            pass
    assert len(generation.results()[0].tokens) == 2


def test_a_conversation_goes_on_after_the_error(nano, poison):
    expected = "".join(piece.text for piece in Conversation(*nano).send(ASK))
    conversation = Conversation(*nano)
    poison(1)
    with refused("logits_not_finite"):
        list(conversation.send("Hello"))
    assert conversation.messages == []
    poison(None)
    assert "".join(piece.text for piece in conversation.send(ASK)) == expected
