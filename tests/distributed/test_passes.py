"""Passes of a model over several ranks, one by one, against those of one process."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from distributed.ranks import ranks
from geometries import changed

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.model.model import Model, Visual
from mlx_qwen35.model.pace import Pace

CLOSE = 1e-5  # of logits, as far as sums in another order go
# Four heads of each kind, so that 2 and 4 ranks divide them, and a vocabulary that they do not divide.
DIVIDED = changed(
    geometry("tiny"), num_attention_heads=8, num_key_value_heads=4, linear_num_key_heads=4, linear_num_value_heads=8,
    vocab_size=1021, hidden_size=128, intermediate_size=256,
)  # fmt: skip
FULL = pytest.mark.full


def steps(model: Model) -> list[np.ndarray]:
    """The logits of passes of every kind, each behind the others."""
    rng, found = np.random.default_rng(0), []

    def feed(cache: Cache, tokens: list[list[int]], **more) -> None:
        hidden = model.hidden(mx.array(tokens), cache, **more)
        found.append(np.array(model.logits(hidden, model.active(cache))))

    def drawn(B: int, T: int) -> list[list[int]]:
        return rng.integers(0, 1021, (B, T)).tolist()

    cache = model.make_cache()
    places = Visual(mx.array([0, 0]), mx.array([1, 2]), mx.array(rng.normal(size=(2, 128)).astype(np.float32)))
    positions = np.array([[[0, 1, 1, 3, 4]], [[0, 1, 1, 3, 4]], [[0, 1, 2, 3, 4]]])
    feed(cache, drawn(1, 5), visual=places, positions=positions)
    feed(cache, drawn(1, 6), at=mx.array([4]), pace=Pace())
    snapshot = cache.snapshot()
    feed(cache, drawn(1, 3))
    cache.restore(snapshot)
    feed(cache, drawn(1, 1))
    other = model.make_cache()
    feed(other, drawn(1, 4))
    both = Cache.joined([cache, other, snapshot.cache()])
    before = both.position
    feed(both, drawn(3, 4), lengths=[4, 1, 3], stepwise=True)
    found[-1] = found[-1][[0, 0, 1, 2, 2], [0, 3, 0, 0, 2]]  # the rest is padding
    both.rollback(before, [2, 1, 3])
    feed(both, drawn(3, 1))
    feed(both.select([2, 0]), drawn(2, 2))
    both.compact()
    feed(both, drawn(3, 2), lengths=[2, 1, 1])
    found[-1] = found[-1][:, :1]
    feed(both, drawn(3, 1))
    found.append(np.array(model.embed(mx.array(drawn(2, 3)))))
    found.append(np.array(model.logits(mx.array(rng.normal(size=(2, 128)).astype(np.float32)))))
    return found


@pytest.mark.parametrize("split", [2, pytest.param(4, marks=FULL)])
@pytest.mark.parametrize("tied", [pytest.param(True, marks=FULL), False])
def test_passes_in_the_tensor_split_are_those_of_one_process(checkpoint_folder, text_model, split, tied):
    config = changed(DIVIDED, tie_word_embeddings=tied)
    with ranks(checkpoint_folder(config), split) as ranked:
        for alone, together in zip(steps(text_model(config)), steps(ranked.model), strict=True):
            np.testing.assert_allclose(together, alone, atol=CLOSE, rtol=0)


@pytest.mark.parametrize(
    "bounds", [(0, 3, 4), pytest.param((0, 1, 4), marks=FULL), pytest.param((0, 1, 2, 3, 4), marks=FULL)]
)
def test_passes_in_a_pipeline_are_those_of_one_process_to_the_bit(checkpoint_folder, text_model, bounds):
    with ranks(checkpoint_folder(DIVIDED), [range(*own) for own in pairwise(bounds)]) as ranked:
        for alone, together in zip(steps(text_model(DIVIDED)), steps(ranked.model), strict=True):
            np.testing.assert_array_equal(together, alone)


@FULL
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_pipeline_in_16_bit_gives_the_bits_of_one_process(checkpoint_folder, text_model, dtype):
    tokens = mx.array([[*range(5, 40)]])
    with ranks(checkpoint_folder(DIVIDED), [range(2), range(2, 4)], dtype=dtype) as ranked:
        assert mx.array_equal(ranked.model(tokens), text_model(DIVIDED, dtype=dtype)(tokens))
