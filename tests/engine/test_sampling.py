"""Logits -> distribution -> token. That the distribution is transformers' is shown in tests/parity/test_warpers.py."""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35 import PRESETS, Sampling, load
from mlx_qwen35.engine.distribution import process
from mlx_qwen35.engine.generation import exempting
from mlx_qwen35.engine.options import check_options
from mlx_qwen35.engine.sampling import Sampler, draws_xtc, noise, sample

V = 300


def mlx_lms() -> ModuleType:
    """mlx_lm.sample_utils, without the package around it, which imports transformers."""
    folder = find_spec("mlx_lm").submodule_search_locations[0]
    spec = spec_from_file_location("sample_utils", Path(folder) / "sample_utils.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample_utils = mlx_lms()


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


# --- min_tokens_to_keep and XTC --------------------------------------------------------------------------------------

ALWAYS = mx.array([True, True])


@pytest.mark.core(2)
@pytest.mark.parametrize(("keep", "min_p"), [(1, 0.3), (2, 0.9), (7, 0.5), (V, 1.0), (V + 1, 1.0)])
def test_min_p_is_mlx_lms(logits, keep, min_p):
    theirs = sample_utils.apply_min_p(logits - mx.logsumexp(logits, -1, keepdims=True), min_p, min(keep, V))
    ours = probabilities(logits, min_p=min_p, min_tokens_to_keep=keep)
    np.testing.assert_allclose(ours, np.array(mx.softmax(theirs, -1)), atol=1e-6)


def test_min_p_keeps_its_tokens_of_those_that_the_filters_left(logits):
    kept = probabilities(logits, top_k=5, min_p=1.0, min_tokens_to_keep=9) > 0
    np.testing.assert_array_equal(kept, probabilities(logits, top_k=5) > 0)


@pytest.mark.core(4)
@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("exempt", [(), (5, 17), tuple(range(V))])
def test_xtc_is_mlx_lms(logits, threshold, exempt):
    theirs = sample_utils.apply_xtc(logits, 1.0, threshold, list(exempt))
    sampling = Sampling(xtc_probability=1.0, xtc_threshold=threshold, xtc_special_tokens=exempt)
    ours = np.exp(np.array(process(logits, sampling, drawn=ALWAYS)))
    np.testing.assert_allclose(ours, np.array(mx.softmax(theirs, -1)), atol=1e-6)


def test_xtc_acts_on_the_rows_that_it_is_drawn_for_behind_the_other_filters(logits):
    sampling = Sampling(temp=1.5, top_k=6, top_p=0.95, xtc_probability=0.5, xtc_threshold=0.1)
    before = process(logits, Sampling(temp=1.5, top_k=6, top_p=0.95))
    after = np.array(process(logits, sampling, drawn=mx.array([False, True])))
    np.testing.assert_array_equal(after[0], np.array(before[0]))
    expected = np.array(mx.softmax(sample_utils.apply_xtc(before[1:], 1.0, 0.1, []), -1))[0]
    np.testing.assert_allclose(np.exp(after[1]), expected, atol=1e-6)
    assert (after[1] == -np.inf).sum() > (after[0] == -np.inf).sum()


def test_xtc_leaves_out_end_tokens_the_end_of_thinking_and_line_ends():
    _, processor = load("nano")
    exempt = exempting(Sampling(xtc_probability=0.5), processor).xtc_special_tokens
    texts = {processor.tokenizer.decode([token]) for token in exempt}
    assert texts == {"<|im_end|>", "<|endoftext|>", "</think>", "\n"}
    own = Sampling(xtc_probability=0.5, xtc_special_tokens=())
    assert exempting(own, processor) == own and exempting(Sampling(), processor) == Sampling()


def test_xtc_is_drawn_with_its_probability_and_not_with_the_noise():
    sampling = Sampling(xtc_probability=0.3)
    drawn = np.array(mx.stack([draws_xtc(sampling, 4, place) for place in range(1000)]))
    first = np.array(mx.stack([noise(8, 4, place)[0] for place in range(1000)]))
    assert abs(drawn.mean() - 0.3) < 0.05
    assert abs(np.corrcoef(drawn, first)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"min_tokens_to_keep": 0}, "option_invalid"), ({"xtc_probability": 1.5}, "option_invalid"),
        ({"xtc_threshold": 0.6}, "option_invalid"), ({"xtc_special_tokens": 5}, "option_invalid"),
        ({"xtc_special_tokens": [-1]}, "option_invalid"), ({"temp": 0, "xtc_probability": 0.5}, "option_conflict"),
    ],
)  # fmt: skip
def test_xtc_refuses_what_it_cannot_do(options, code):
    with refused(code, next(name for name in reversed(options))):
        Sampling(**options)


@pytest.mark.parametrize(("name", "other"), [("min_tokens_to_keep", "min_p"), ("xtc_threshold", "xtc_probability")])
def test_an_option_that_refines_another_is_refused_without_it(name, other):
    for given in ({}, {other: 0}):
        with refused("option_no_effect", name, other):
            check_options({name: getattr(Sampling(), name)} | given)
