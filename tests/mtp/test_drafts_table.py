"""The computed table of docs/drafts.md follows from the rule that stands above it."""

import re
from itertools import accumulate
from operator import mul
from pathlib import Path

import pytest

from mlx_qwen35.engine.drafts.depth import PRIOR_RATIO

_, _, TEXT = (Path(__file__).parents[2] / "docs" / "drafts.md").read_text().partition("## What drafts should gain")
LINES = [line for line in TEXT.splitlines() if line.startswith("| ")][1:]  # without the head
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]
DRAFT, ULTRA, MAX_AT_THREE = 0.17, 3.2, 1.71  # plain steps of a draft and of four rows; gain


def tokens_a_step(shares: list[float]) -> float:
    return 1 + sum(accumulate(shares, mul))


def gains(shares: list[float], four_rows: float) -> list[float]:
    return [
        tokens_a_step(shares[:depth]) / (1 + (four_rows - 1) * depth / 3 + depth * DRAFT) for depth in (1, 2, 3)
    ]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_gains_follow_from_acceptance(row: list[str]):
    source, *columns = row
    ultra, most = ([float(gain) for gain in column.split(", ") if gain] for column in columns)
    said = [float(share) / 100 for share in re.findall(r"[\d.]+(?= %|, then| and \d+ %)", source)]
    shares = said if len(said) == 3 else [said[0] * PRIOR_RATIO**j for j in range(3)]
    four_rows = tokens_a_step(shares) / MAX_AT_THREE - 3 * DRAFT
    assert ultra == pytest.approx(gains(shares, ULTRA), abs=0.011)
    assert most == pytest.approx(gains(shares, four_rows) if four_rows >= 1 else [], abs=0.011)
