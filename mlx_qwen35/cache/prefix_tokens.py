"""A prompt, or its beginning, as the model reads it: what a library of prefixes compares."""

from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np


class Shown(NamedTuple):
    """An image or a video of a prompt: its pixels, and (start, height, width) of each placeholder, in tokens."""

    digest: str
    places: tuple[tuple[int, int, int], ...]

    @property
    def start(self) -> int:
        return self.places[0][0]

    @property
    def stop(self) -> int:
        start, height, width = self.places[-1]
        return start + height * width


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt, or its beginning, as the model reads it: tokens (n,) int32, and what its placeholders show, in order.

    Equal prefixes of one model have the same cache. adapter: the name of the one that reads it, in a folder its
    fingerprint; "" for none. Prefixes of two adapters share nothing.
    """

    tokens: np.ndarray
    media: tuple[Shown, ...] = ()
    adapter: str = ""

    def __len__(self) -> int:
        return len(self.tokens)

    def whole(self, length: int) -> bool:
        """Whether the first `length` tokens end outside of every image and video."""
        return not any(shown.start < length < shown.stop for shown in self.media)

    def upto(self, length: int) -> "Prefix":
        """The first `length` tokens."""
        media = tuple(shown for shown in self.media if shown.start < length)
        return replace(self, tokens=self.tokens[:length], media=media)

    def shared(self, other: "Prefix") -> int:
        """How many tokens are the same from the first on, with what they show."""
        if self.adapter != other.adapter:
            return 0
        starts = [shown.start for pair in zip_longest(self.media, other.media) if pair[0] != pair[1]
                  for shown in pair if shown]  # fmt: skip
        return min([_common(self.tokens, other.tokens), *starts])

    def same(self, other: "Prefix") -> bool:
        return len(self) == len(other) and self.begins(other)

    def begins(self, other: "Prefix") -> bool:
        """Whether the other goes on from this one, or is the same."""
        n = len(self)
        if self.adapter != other.adapter:
            return False
        return n <= len(other) and self.media == other.upto(n).media and _common(self.tokens, other.tokens) == n


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many numbers are the same from the first on. Most prompts part early, so it looks at few first."""
    end, start, size = min(len(one), len(other)), 0, 64
    while start < end:
        stop = min(start + size, end)
        differ = one[start:stop] != other[start:stop]
        if differ.any():
            return start + int(differ.argmax())
        start, size = stop, 4 * size
    return end
