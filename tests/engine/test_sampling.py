"""Logits -> distribution -> token. That the distribution is transformers' is shown in tests/parity/test_warpers.py."""

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35 import PRESETS, Sampling
from mlx_qwen35.engine.sampling import Sampler, noise, process, sample

V = 300


@pytest.fixture
def logits(rng: np.random.Generator) -> mx.array:
    return mx.array(rng.normal(0, 3, (2, V)).astype(np.float32))


def probabilities(logits: mx.array, **options) -> np.ndarray:
    counts = options.pop("counts", None)
    return np.exp(np.array(process(logits, Sampling(**options), counts, options.pop("vocabulary", 0))))


def test_the_distribution_adds_up_to_one(logits):
    for options in (
        {},
        {"temp": 0.3},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.1},
    ):
        np.testing.assert_allclose(probabilities(logits, **options).sum(-1), 1, atol=1e-5)


def test_temperature_comes_before_the_filters(logits):
    hot = probabilities(logits, temp=3.0, top_p=0.8)
    cold = probabilities(logits, temp=0.5, top_p=0.8)
    assert ((hot > 0).sum(-1) > (cold > 0).sum(-1)).all()


def test_top_k_keeps_the_k_best(logits):
    kept = probabilities(logits, top_k=5) > 0
    best = np.argsort(-np.array(logits), -1)[:, :5]
    assert (kept.sum(-1) == 5).all()
    assert np.take_along_axis(kept, best, -1).all()


def test_top_p_counts_within_what_top_k_left(logits):
    # Of the 4 best, renormalised, those that reach 0.7; over the whole vocabulary it would take more tokens.
    top = np.sort(np.array(logits), -1)[:, ::-1][:, :4]
    share = np.exp(top) / np.exp(top).sum(-1, keepdims=True)
    expected = (np.cumsum(share, -1) - share < 0.7).sum(-1)
    np.testing.assert_array_equal((probabilities(logits, top_k=4, top_p=0.7) > 0).sum(-1), expected)


def test_temperature_zero_is_greedy(logits):
    np.testing.assert_array_equal(probabilities(logits, temp=0).argmax(-1), np.array(logits).argmax(-1))
    samplers = [Sampler(Sampling(temp=0), seed, 0, V) for seed in (1, 2)]
    np.testing.assert_array_equal(np.array(sample(samplers, logits)), np.array(logits).argmax(-1))


def test_padding_rows_of_the_vocabulary_are_never_drawn():
    logits = mx.zeros((1, V)).at[:, 200:].add(50.0)  # the head likes them
    for options in ({"temp": 0}, {"temp": 1.0}, {"temp": 1.0, "top_k": 20}):
        sampler = Sampler(Sampling(**options), 0, 0, vocabulary=200)
        assert all(sample([sampler], logits).item() < 200 for _ in range(50))
    assert (np.exp(np.array(process(logits, Sampling(), vocabulary=200)))[:, 200:] == 0).all()


def test_logit_bias_forbids_and_forces(logits):
    best = int(np.array(logits)[0].argmax())
    assert probabilities(logits, logit_bias={best: -1e9})[0, best] == 0
    assert probabilities(logits, logit_bias={7: 1e4})[0, 7] == pytest.approx(1)


def test_penalties_are_those_of_the_definition(logits, rng):
    counts = rng.integers(0, 3, (2, V)).astype(np.float32)
    options = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
    x = np.array(logits)
    x = np.where(counts > 0, np.where(x < 0, x * 1.3, x / 1.3), x) - 0.7 * (counts > 0) - 0.4 * counts
    expected = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities(logits, counts=mx.array(counts), **options), expected, atol=1e-6)


def test_penalties_count_every_generated_token(logits):
    flat = mx.zeros((1, V))
    sampler = Sampler(Sampling(temp=0, presence_penalty=1.0), 0, 0, V)
    drawn = [sample([sampler], flat).item() for _ in range(V)]
    assert sorted(drawn) == list(range(V)), "each token once, before any comes again"


def test_the_noise_depends_on_seed_and_position_alone():
    assert (noise(V, 3, 5) == noise(V, 3, 5)).all()
    assert not (noise(V, 3, 5) == noise(V, 3, 6)).any()
    assert not (noise(V, 3, 5) == noise(V, 4, 5)).any()


def test_a_token_is_the_same_alone_and_in_a_batch(logits):
    rows = [(11, 40), (12, 7)]
    together = sample([Sampler(Sampling(), *row, V) for row in rows], logits).tolist()
    alone = [sample([Sampler(Sampling(), *row, V)], logits[i : i + 1]).item() for i, row in enumerate(rows)]
    assert together == alone


def test_drawn_tokens_follow_the_distribution(rng):
    """Chi-square of 4,000 draws at 4,000 positions among 11 tokens: by chance above 29.6 once in a thousand times."""
    logits = mx.array(rng.normal(0, 1, (1, 40)).astype(np.float32))
    sampling = Sampling(temp=1.3, top_k=11)
    expected = np.exp(np.array(process(logits, sampling)))[0]
    rows = mx.broadcast_to(logits, (4000, 40))
    drawn = np.array(sample([Sampler(sampling, 9, position, 40) for position in range(4000)], rows))
    counts = np.bincount(drawn, minlength=40)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert ((counts[kept] - 4000 * expected[kept]) ** 2 / (4000 * expected[kept])).sum() < 29.6


def test_presets_are_the_published_ones():
    values = {
        n: (p.sampling.temp, p.sampling.top_p, p.sampling.top_k, p.sampling.presence_penalty)
        for n, p in PRESETS.items()
    }
    assert values == {
        "thinking": (1.0, 0.95, 20, 1.5),
        "coding": (0.6, 0.95, 20, 0.0),
        "instruct": (0.7, 0.8, 20, 1.5),
        "reasoning": (1.0, 1.0, 40, 2.0),
    }
    assert {name: preset.max_tokens for name, preset in PRESETS.items()}["coding"] == 81920


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temp", -0.1),
        ("temp", float("nan")),
        ("temp", float("inf")),
        ("temp", 1e-40),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_bad_value_is_told(name, value):
    with refused("option_invalid", name, value):
        Sampling(**{name: value})


@pytest.mark.parametrize("bias", [{-1: 1.0}, {"17": 1.0}, {True: 1.0}, {3: float("nan")}, {3: float("inf")}, {3: "x"}])
def test_a_bad_logit_bias_is_told(bias):
    with refused("option_invalid", "logit_bias"):
        Sampling(logit_bias=bias)


def test_rows_may_have_samplings_of_their_own(logits):
    samplings = [Sampling(temp=0), Sampling(temp=2.0, presence_penalty=1.0)]
    both, alone = ([Sampler(sampling, 1, 5, V) for sampling in samplings] for _ in range(2))
    for _ in range(5):
        assert sample(both, logits).tolist() == [sample([s], logits[i : i + 1]).item() for i, s in enumerate(alone)]


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_a_bad_seed_is_told(seed):
    with refused("option_invalid", "0", "4294967295", seed):
        Sampler(Sampling(), seed, 0, V)
