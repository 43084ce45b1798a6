"""Likelihoods of continuations against transformers: 50 pairs, alone and several of one context together."""

import numpy as np
import pytest
from parity import cases

from mlx_qwen35.measure.score import likelihoods

# Of a continuation of up to 16 tokens: each logprob differs by 1e-6 to 1e-5, as two float32 programs do.
TOLERANCE = 1e-4

CASES = [
    pytest.param(case, marks=pytest.mark.full if case.name in cases.MORE_DRAWS else (), id=case.name)
    for case in cases.CASES
]
# (context, continuation), in tokens: of which the golden files have every token's logprob
PAIRS = [
    *((before, length) for length in (1, 2, 3, 5, 8) for before in range(1, 10 - length)),
    *((before, length) for length in (*range(1, 11), 12, 16) for before in (130, 597) if before == 597 or length == 1),
    *((before, length) for length in range(1, 12) for before in (604,)),
]


ROWS = cases.kept((cases.PROMPT + cases.DECODED - 1, 1))[0].tolist()  # that a golden file has


def expected(reference: cases.Reference, before: int, length: int) -> float:
    rows = list(range(len(reference.arrays["logprobs"]))) if reference.live else ROWS
    places = [rows.index(row) for row in range(before - 1, before - 1 + length)]
    return float(reference.arrays["logprobs"][places, 0].sum(dtype=np.float64))


def test_fifty_pairs_are_compared_and_those_of_one_token_are_among_them():
    assert len(set(PAIRS)) == 50 and sum(length == 1 for _, length in PAIRS) > 10


@pytest.mark.core(1)
@pytest.mark.parametrize("case", CASES)
def test_likelihoods_are_those_of_transformers(case, parity_model, reference):
    model, tokens = parity_model(case), cases.tokens(case, cases.PROMPT + cases.DECODED).tolist()
    told = reference(case)
    for before in sorted({before for before, _ in PAIRS}):
        lengths = [length for own, length in PAIRS if own == before]
        ends = [tokens[before : before + length] for length in lengths]
        together = likelihoods(model, tokens[:before], ends)
        for length, end, found in zip(lengths, ends, together, strict=True):
            assert abs(found.sum - expected(told, before, length)) < TOLERANCE, (before, length)
            assert found.tokens == tuple(end)
        if before in (3, 604):
            (alone,) = likelihoods(model, tokens[:before], ends[-1:])
            assert abs(alone.sum - together[-1].sum) < 1e-6
