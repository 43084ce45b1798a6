"""The position of each token of a prompt on the three axes of interleaved M-RoPE: time, height, width."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Placeholder(NamedTuple):
    """The tokens of one image, or of one pair of frames of a video: height * width of them, from `start` on."""

    start: int
    height: int  # in tokens, each a merged square of patches
    width: int

    @property
    def stop(self) -> int:
        return self.start + self.height * self.width


def positions(length: int, placeholders: Sequence[Placeholder], first: int = 0) -> np.ndarray:
    """(3, length) int32: the T, H and W position of each of `length` tokens.

    Text counts up on all three axes alike, from `first` on. An image's tokens, row by row, share one T and have their
    row and column as H and W, counted from the same number. The text after it continues behind the longer side, which
    may be less than the number of tokens. Each pair of frames of a video has positions like an image: the text between
    them tells the time (transformers, Qwen3_5Model.get_rope_index).

    positions(8, [Placeholder(1, 2, 3)], 4) is
        [[4, 5, 5, 5, 5, 5, 5, 8],
         [4, 5, 5, 5, 6, 6, 6, 8],
         [4, 5, 6, 7, 5, 6, 7, 8]]
    """
    table = np.empty((3, length), np.int32)
    at, now = 0, first
    for start, height, width in placeholders:
        table[:, at:start] = np.arange(now, now + start - at)
        now += start - at
        at = start + height * width
        rows, columns = np.divmod(np.arange(height * width), width)
        table[:, start:at] = now + np.stack([np.zeros_like(rows), rows, columns])
        now += max(height, width)
    table[:, at:] = np.arange(now, now + length - at)
    return table
