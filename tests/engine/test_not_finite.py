"""Activations that leave the range of their dtype: where it began is said, and what the caller has stays usable."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_text_model
from refusing import refused

from mlx_qwen35 import Model, batch_generate, generate, load
from mlx_qwen35.doctor import probe
from mlx_qwen35.doctor.probe import TEXT, describe, residual_maxima
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.generation import start
from mlx_qwen35.engine.loop import decode
from mlx_qwen35.engine.prefill import PromptRow, prefill

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

    def poisoned(self, hidden):
        calls.append(hidden.shape)
        return logits(self, hidden) * (mx.nan if first is not None and len(calls) >= first else 1)

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


class OneByOne:
    """A model and sampler in one: row i draws token i + 1 until it has drawn `counts[i]`, then 0, the stop id.

    bad: (row, step) whose logits are not finite.
    """

    dtype = mx.float16

    def __init__(self, counts: Sequence[int], bad: tuple[int, int]):
        self.counts, self.bad, self.step = counts, bad, 0

    def hidden(self, tokens, cache, lengths=None, stepwise=False):
        return mx.zeros((len(self.counts), 1, 1))

    def logits(self, hidden):
        rows = [[0.0] * len(self.counts) + [0.0] for _ in self.counts]
        for row, count in enumerate(self.counts):
            rows[row][row + 1 if self.step < count else 0] = 1.0
            if row == self.bad[0] and self.step >= self.bad[1]:
                rows[row][0] = float("nan")
        self.step += 1
        return mx.array(rows)[:, None]

    def peek(self, logits, drafted=None):
        return mx.argmax(mx.nan_to_num(logits), axis=-1)

    def commit(self, tokens):
        pass


def decoded(counts: Sequence[int], bad: tuple[int, int], limits: Sequence[int]) -> list[list[int | None]]:
    both = OneByOne(counts, bad)
    cache = SimpleNamespace(first_not_finite=lambda row: None, position=None)
    return list(decode(both, cache, mx.zeros((len(counts), 1)), both, limits, stop_ids=(0,)))


def test_rows_that_have_ended_do_not_matter():
    assert decoded([1, 4], (0, 2), [9, 9]) == [[1, 2], [0, 2], [None, 2], [None, 2], [None, 0]]
    assert decoded([9, 9], (0, 2), [2, 4])[2:] == [[None, 2], [None, 2]]
    with refused("logits_not_finite"):
        decoded([9, 9], (1, 2), [2, 4])


def test_no_token_is_drawn_from_logits_that_are_not_finite():
    both, seen = OneByOne([9], (0, 3)), []
    cache = SimpleNamespace(first_not_finite=lambda row: 0, position=None)
    with refused("logits_not_finite", "0"):
        seen.extend(decode(both, cache, mx.zeros((1, 1)), both, [9], stop_ids=(0,)))
    assert seen == [[1]] * 3  # of steps 0, 1 and 2
    assert both.step == 5  # the third was looked at with the next one under way


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
def test_any_value_that_is_not_finite_counts(nano, monkeypatch, value):
    logits = Model.logits
    last = mx.arange(1024) == 1023
    monkeypatch.setattr(Model, "logits", lambda self, hidden: mx.where(last, value, logits(self, hidden)))
    with refused("logits_not_finite"):
        generate(*nano, ASK, max_tokens=3)


# --- where it is in the cache ----------------------------------------------------------------------------------------


def cache_of_two(model):
    cache = model.make_cache(2)
    prefill(model, cache, [PromptRow(list(range(5, 25))), PromptRow(list(range(30, 37)))], 64)
    return cache


def test_a_finite_cache_names_no_layer(text_model):
    cache = cache_of_two(text_model())
    assert [cache.first_not_finite(row) for row in (0, 1)] == [None, None]
    assert text_model().make_cache().first_not_finite(0) is None


@pytest.mark.parametrize("value", [mx.nan, mx.inf])
def test_the_first_layer_of_the_row_is_named(text_model, value):
    cache = cache_of_two(text_model())
    memory = cache.layers[2].state
    state = mx.array(memory.recurrent_state)
    state[1, 0, 0, 0] = value
    cache.layers[2].state = memory._replace(recurrent_state=state)
    cache.layers[3].keys[:, :, 3, 0] = value
    assert [cache.first_not_finite(row) for row in (0, 1)] == [3, 2]


def test_holes_and_columns_not_yet_in_use_do_not_count(text_model):
    cache = cache_of_two(text_model())
    values = cache.layers[3].values
    values[1, :, 7:20] = mx.nan  # holes of the second row
    values[:, :, 20:] = mx.nan
    assert [cache.first_not_finite(row) for row in (0, 1)] == [None, None]
    values[1, :, 6] = mx.nan
    assert [cache.first_not_finite(row) for row in (0, 1)] == [None, 3]


# --- afterwards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_caller_s_cache_is_as_it_was_and_goes_on(nano, poison, step):
    model, processor = nano
    cache = model.make_cache()
    prefill(model, cache, [PromptRow(processor.encode_text("Hello").tokens)], 64)
    before = {name: np.array(array) for name, array in cache.arrays().items()}
    poison(step)
    with refused("logits_not_finite"):
        generate(model, processor, ASK, cache=cache, max_tokens=9)
    poison(None)
    after = cache.arrays()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
    fresh = model.make_cache()
    prefill(model, fresh, [PromptRow(processor.encode_text("Hello").tokens)], 64)
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
