"""Text that repeats itself without end: found by its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LONGEST = 512  # tokens of the longest period that is looked for


@dataclass(frozen=True)
class Loop:
    """The tokens of an answer repeat.

    start: number of the first token of the repetition. period: tokens that repeat. times: how often they had come when
    it was found.
    """

    start: int
    period: int
    times: int

    def __str__(self) -> str:
        return f"{self.period} tokens repeat from token {self.start + 1} on"


_PERIODS = np.arange(1, LONGEST + 1)
# How many tokens in a row must equal the one a period before. Measured, see docs/thinking.md.
LEAST, TIMES = 256, 6
_NEEDED = np.maximum(LEAST, TIMES * _PERIODS)


class Recent(NamedTuple):
    """The last tokens of a sequence, and how long they have repeated. A value: `after` gives another."""

    length: int
    tokens: np.ndarray  # (LONGEST,) the newest first; -1: none yet
    runs: np.ndarray  # (LONGEST,) by period: how many tokens in a row equal the one a period before

    def after(self, token: int) -> "Recent":
        """With one more token."""
        runs = np.where(self.tokens == token, self.runs + 1, 0)
        tokens = np.empty_like(self.tokens)
        tokens[0], tokens[1:] = token, self.tokens[:-1]
        return Recent(self.length + 1, tokens, runs)

    @property
    def loop(self) -> Loop | None:
        """The loop that the last tokens are, of the shortest period."""
        found = np.flatnonzero(self.runs >= _NEEDED)
        if not len(found):
            return None
        period = int(_PERIODS[found[0]])
        repeated = int(self.runs[found[0]]) + period
        return Loop(self.length - repeated, period, repeated // period)


NOTHING = Recent(0, np.full(LONGEST, -1), np.zeros(LONGEST, int))


def first_loop(tokens: Sequence[int]) -> Loop | None:
    """The first loop of a whole sequence, as `Recent` finds it token by token."""
    ids, first = np.array(tokens), None
    for period, needed in zip(_PERIODS.tolist(), _NEEDED.tolist(), strict=True):
        if len(ids) < period + needed:
            break
        equal = np.concatenate([[False], ids[period:] == ids[:-period], [False]])
        edges = np.flatnonzero(equal[1:] != equal[:-1])
        begins = edges[::2][edges[1::2] - edges[::2] >= needed]
        if len(begins) and (first is None or begins[0] + period + needed < first[0]):
            first = (int(begins[0]) + period + needed, Loop(int(begins[0]), period, (needed + period) // period))
    return first and first[1]
