"""Needles: numbers of people hidden in a long text, asked for at its end."""

import itertools
import math
from collections.abc import Sequence
from random import Random

from tasks.clips import DIRECTIONS
from tasks.figures import COLOURS, SHAPES
from tasks.items import Context, Task, Turn, join, vary
from tasks.lists import LIST_QUESTIONS
from tasks.names import CITIES, NAMES
from tasks.sums import PIECES
from tasks.tools import SKIES

OPENINGS = ("Look:", "Remember this:", "Here is a list:", "Note this:")
FILLERS = (
    "it is {degrees} degrees and {sky} in {city}.",
    "the weather in {city} is {sky}.",
    "I see a {colour} {shape}.",
    "the {colour} {shape} moves {direction}.",
    "the sum is {sum}.",
)
SEVERAL_QUESTIONS = ("What are the numbers of {}?", "Which numbers have {}?", "Tell me the numbers of {}.")
MOST = 400  # facts in one text
SHORT = (48, 200)  # tokens of a text in a row of the training


def size(line: str) -> int:
    """The tokens of a line behind a blank: nano's tokenizer has every word of these lines whole."""
    return len(PIECES.findall(f" {line}"))


def _filler(rng: Random) -> str:
    return rng.choice(FILLERS).format(
        degrees=rng.randint(-9, 39),
        sky=rng.choice(SKIES),
        city=rng.choice(CITIES),
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES),
        direction=rng.choice(list(DIRECTIONS)),
        sum=rng.randint(10, 99),
    )


def _keys(rng: Random, count: int) -> list[str]:
    """A name each, or a name and a city where there are many or the dice say so."""
    if count <= 8 and rng.random() < 0.6:
        return rng.sample(NAMES, count)
    pairs = rng.sample(range(len(NAMES) * len(CITIES)), count)
    return [f"{NAMES[pair % len(NAMES)]} {CITIES[pair // len(NAMES)]}" for pair in pairs]


def haystack(rng: Random, tokens: int, facts: int, depth: float) -> Context:
    """A text of at most `tokens` tokens that holds `facts` numbers; the first asked for lies at `depth`, 0 to 1.

    `Context.data` holds the numbers by their keys, and these in the order of the questions, over and over.
    """
    table = {key: rng.randint(10, 99) for key in _keys(rng, facts)}
    needle, *lines = [f"{key}: {value}." for key, value in table.items()]
    room = tokens - size(needle) - sum(map(size, lines))
    while (room := room - size(line := _filler(rng))) >= 0:
        lines.append(line)
    rng.shuffle(lines)
    lines.insert(round(depth * len(lines)), needle)
    return Context((table, itertools.cycle(table)), intro=(f"{rng.choice(OPENINGS)} {' '.join(lines)} ",))


def spread(rng: Random, low: int, high: int) -> int:
    """A length between two, each doubling as likely as the next."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _any(rng: Random, tokens: int, facts: int | None = None, depth: float | None = None) -> Context:
    """A haystack whose number of facts, a few or up to 400, and depth the dice choose where they are None."""
    if facts is None:
        most = min(MOST, tokens // 9)
        facts = rng.randint(1, min(8, most)) if rng.random() < 0.35 else spread(rng, min(4, most), most)
    return haystack(rng, tokens, facts, rng.random() if depth is None else depth)


def _ask(rng: Random, context: Context, count: int, questions: Sequence[str]) -> Turn:
    table, order = context.data
    keys = list(itertools.islice(order, count))
    values = [str(table[key]) for key in keys]
    question = vary(rng, rng.choice(questions).format(join(keys)))
    found = join([f"{key}: {value}" for key, value in zip(keys, values, strict=True)])
    # the text alone decides the split: no question about a held-out text is ever trained
    return Turn(question, f"The list says {found}.", join(values), f"needle:{context.intro[0]}")


def _one(rng: Random, context: Context) -> Turn:
    return _ask(rng, context, 1, LIST_QUESTIONS)


def _more(rng: Random, context: Context, turn: Turn) -> Turn:
    """The next number, or the next two or three."""
    most = min(3, len(context.data[0]))
    if most > 1 and rng.random() < 0.2:
        return _ask(rng, context, rng.randint(2, most), SEVERAL_QUESTIONS)
    return _one(rng, context)


def needle(tokens: int, facts: int | None = None, depth: float | None = None) -> Task:
    """The task with texts of that many tokens and of that many facts, the first asked for at that depth."""
    return Task(NEEDLE.name, lambda rng, easy: _any(rng, tokens, facts, depth), _one, _more)


NEEDLE = Task("needle", lambda rng, easy: _any(rng, spread(rng, *SHORT)), _one, _more)
