"""Long texts with needles: numbers that stand between sentences of no interest, and questions about them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

NAMES = "tom anna ben lena max ida paul nora finn emma leo mia jan eva tim sara noah lily hugo rosa".split()
PLACES = "Berlin Paris London Rome Madrid Vienna Oslo Lisbon Prague Dublin Athens Warsaw Tokyo Delhi Cairo".split()
COLOURS = "red blue green yellow black white".split()
FILLERS = (
    "the weather in {place} is {sky}.",
    "I see a {colour} circle.",
    "the {colour} square moves to the {side}.",
    "it is {sky} and the {colour} circle moves {side}.",
    "I see a {colour} square and a {other} circle in {place}.",
)
CHAIN = 3  # lines from the number to the key that is asked for


@dataclass(frozen=True)
class Needle:
    """A number that a text holds, and the question about it."""

    depth: float  # of its line: 0 the beginning of the text, 1 its end
    lines: tuple[tuple[float, str], ...]  # depth and text of each of its lines
    key: str
    number: int

    @property
    def question(self) -> str:
        return f"What is the number of {self.key}?"


def _depths(needle: float) -> Iterator[float]:
    """Where the lines of a chain stand that begins at a depth: evenly from there on."""
    return (needle + (1 - needle) * link / CHAIN for link in range(CHAIN))


def needles(random: Random, kind: str, depths: Sequence[float]) -> list[list[Needle]]:
    """The needles of each text of a kind, of one at each depth.

    single: each text has one. several: one text has all, so that each is beside others. chain: the same, and what is
    asked for is the last of CHAIN keys, of which each but the first has the number of the one before.
    """
    links = CHAIN if kind == "chain" else 1
    keys = iter([f"{NAMES[n % len(NAMES)]} {PLACES[n // len(NAMES)]}" for n in _sample(random, len(depths) * links)])
    numbers = random.sample(range(10, 100), len(depths))
    found = []
    for depth, number in zip(depths, numbers, strict=True):
        names = [next(keys) for _ in range(links)]
        said = [f"{names[0]}: {number}.", *(f"{name}: as {names[i]}." for i, name in enumerate(names[1:]))]
        places = _depths(depth) if links > 1 else [depth]
        found.append(Needle(depth, tuple(zip(places, said, strict=True)), names[-1], number))
    return [[needle] for needle in found] if kind == "single" else [found]


def _sample(random: Random, count: int) -> list[int]:
    return random.sample(range(len(NAMES) * len(PLACES)), count)


class Haystack:
    """Sentences of no interest, the same for all texts of a seed, and the tokens of each.

    size: text -> its tokens, of a piece of a longer text.
    """

    def __init__(self, seed: int, size: Callable[[str], int]):
        self._random, self._size = Random(seed), size
        self._lines: list[tuple[str, int]] = []

    def _line(self, index: int) -> tuple[str, int]:
        while len(self._lines) <= index:
            self._lines.append(self._new())
        return self._lines[index]

    def _new(self) -> tuple[str, int]:
        colours = self._random.sample(COLOURS, 2)
        line = self._random.choice(FILLERS).format(
            place=self._random.choice(PLACES), sky=self._random.choice(("sunny", "cloudy", "rainy", "windy")),
            colour=colours[0], other=colours[1], side=self._random.choice(("left", "right", "up", "down")),
        )  # fmt: skip
        return line, self._size(f" {line}")

    @cached_property
    def _short(self) -> list[tuple[str, int]]:
        """Lines for what is left in the end, the longest first."""
        return sorted({self._new() for _ in range(64)}, key=lambda line: (-line[1], line[0]))

    def fill(self, tokens: int) -> list[str]:
        """Lines of at most so many tokens together, and few less."""
        lines: list[str] = []
        while (line := self._line(len(lines)))[1] <= tokens:
            lines.append(line[0])
            tokens -= line[1]
        while fitting := next((line for line in self._short if line[1] <= tokens), None):
            lines.append(fitting[0])
            tokens -= fitting[1]
        return lines


def written(filler: Sequence[str], needles: Sequence[Needle]) -> str:
    """The text of these lines and needles, without a question."""
    lines = sorted((line for needle in needles for line in needle.lines), key=lambda line: line[0])
    text, start = ["Remember this:"], 0
    for depth, line in lines:
        end = round(depth * len(filler))
        text += [*filler[start:end], line]
        start = end
    return " ".join([*text, *filler[start:]])
