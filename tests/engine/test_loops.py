"""What is a loop, and what only looks like one."""

from pathlib import Path

import numpy as np
import pytest

from mlx_qwen35 import load
from mlx_qwen35.engine.constraints.loop import LEAST, LONGEST, NOTHING, TIMES, Loop
from mlx_qwen35.engine.constraints.loop import first_loop as whole

ROOT = Path(__file__).parents[2]
ORDINARY = {
    "a numbered list": "\n".join(f"{i}. Item number {i} of the list" for i in range(1, 120)),
    "a table": "| day | rain | sun |\n|---|---|---|\n" + "\n".join(f"| {i} | 0 | {i % 7} |" for i in range(1, 80)),
    "empty cells": "\n".join(f"| {name} |  |  |  |  |" for name in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus") * 2),
    "JSON": str([{"id": i, "name": f"user {i}", "active": True, "tags": []} for i in range(60)]),
    "numbers": " ".join(str(i * i) for i in range(300)),
    "a rule and blank lines": "-" * 80 + "\n" * 20 + "=" * 80,
    "a refrain": "\n\n".join(
        f"The {what} went down, the night came in,\nand nobody knew its name.\nSing low, sing low, the river is deep,\n"
        "sing low, for it stays the same."
        for what in ("sun", "ship", "flag", "road", "light")
    ),
    "code": (ROOT / "mlx_qwen35/engine/rows.py").read_text(encoding="utf-8")[:8000],
    "prose": (ROOT / "README.md").read_text(encoding="utf-8")[:8000],
}


@pytest.fixture(scope="module")
def tokenizer():
    return load("nano")[1].tokenizer


def first_loop(tokens) -> tuple[int, Loop | None]:
    """How many tokens had come when a loop was found, and the loop."""
    recent = NOTHING
    for count, token in enumerate(tokens, start=1):
        recent = recent.after(token)
        if recent.loop:
            return count, recent.loop
    return len(tokens), None


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_text_is_no_loop(name, tokenizer):
    assert first_loop(tokenizer.encode(ORDINARY[name]))[1] is None


@pytest.mark.parametrize("period", [1, 2, 7, 42, 43, 100, LONGEST])
def test_a_loop_is_found_as_soon_as_it_is_long_enough(period):
    rng = np.random.default_rng(period)
    before, unit = rng.integers(1000, 2000, 50).tolist(), rng.permutation(period).tolist()
    count, loop = first_loop(before + unit * (2 * LEAST + 2 * TIMES))
    needed = max(LEAST, TIMES * period)
    assert count == 50 + period + needed
    assert loop == Loop(start=50, period=period, times=(needed + period) // period)


@pytest.mark.parametrize("seed", range(5))
def test_a_whole_sequence_has_the_loop_that_is_found_token_by_token(seed):
    rng = np.random.default_rng(seed)
    tokens = [int(token) for _ in range(4) for token in np.tile(rng.integers(0, 3, rng.integers(1, 60)), 40)]
    assert whole(tokens) == first_loop(tokens)[1] is not None


def test_a_longer_period_or_a_broken_one_is_no_loop():
    assert first_loop(list(range(LONGEST + 1)) * 8)[1] is None
    assert first_loop(([1] * LEAST + [2]) * 3)[1] is None
