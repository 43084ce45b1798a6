"""Likelihoods of continuations against transformers: 50 pairs, alone and several of one context together."""

from types import SimpleNamespace

import numpy as np
import pytest
from parity import cases

from mlx_qwen35.measure.score import likelihoods

# Of a continuation of up to 8 tokens: each logprob differs by 1e-6 to 1e-5, as two float32 programs do.
TOLERANCE = 1e-4

CASES = [
    pytest.param(case, marks=pytest.mark.full if case.name in cases.MORE_DRAWS else (), id=case.name)
    for case in cases.CASES
]
# (context, continuation), in tokens: of which the golden files have every token's logprob
PAIRS = [
    *((before, length) for length in (1, 2, 3, 5, 8) for before in range(1, 10 - length)),
    *((before, length) for length in (1, 2, 5, 8) for before in (597, 598, 601, 604, 610, 617)),
][:50]  # fmt: skip


@pytest.fixture(scope="module")
def processor():
    """Of tokens that were never text."""
    return SimpleNamespace(check_tokens=list)


def expected(reference: cases.Reference, before: int, length: int) -> float:
    rows = list(range(len(reference.arrays["logprobs"]))) if reference.live else ROWS
    places = [rows.index(row) for row in range(before - 1, before - 1 + length)]
    return float(reference.arrays["logprobs"][places, 0].sum(dtype=np.float64))


ROWS = cases.kept((cases.PROMPT + cases.DECODED - 1, 1))[0].tolist()


def test_fifty_pairs_are_compared_and_those_of_one_token_are_among_them():
    assert len(set(PAIRS)) == 50 and sum(length == 1 for _, length in PAIRS) > 10


@pytest.mark.core(2)
@pytest.mark.parametrize("case", CASES)
def test_likelihoods_are_those_of_transformers(case, parity_model, reference, monkeypatch):
    model, tokens = parity_model(case), cases.tokens(case, cases.PROMPT + cases.DECODED).tolist()
    told = reference(case)
    for before in sorted({before for before, _ in PAIRS}):
        lengths = [length for own, length in PAIRS if own == before]
        ends = [tokens[before : before + length] for length in lengths]
        together = likelihoods(model, processor_of_tokens(), tokens[:before], ends)
        for length, end, found in zip(lengths, ends, together, strict=True):
            (alone,) = likelihoods(model, processor_of_tokens(), tokens[:before], [end])
            assert abs(found.sum - expected(told, before, length)) < TOLERANCE, (before, length)
            assert abs(alone.sum - found.sum) < 1e-6 and found.tokens == tuple(end)
