"""Long thinking: sums of many numbers, a step a line; and answers behind thinking that was cut short."""

import re
from dataclasses import replace
from random import Random

from tasks.items import Context, Task, Turn, vary
from tasks.lists import RECALL
from tasks.numbers import ADD_2, ADD_3
from tasks.tools import TOOL_CITY

CLOSING = "\n\nThat is enough thinking. Now I give the answer.\n</think>\n\n"  # what mlx_qwen35 puts behind a cut
STEPS = 196  # characters of the steps at most, each a token
QUESTIONS = ("What is {}?", "Add {}.", "{}=?", "Please add {}.", "What is the sum of {}?")
SEPARATORS = ("+", " ", "+", ", ")
PIECES = re.compile(r" ?[A-Za-z]+| ?[^\sA-Za-z0-9]+\n*|\d|\s")  # as the tokenizer splits a text before it merges


def steps(numbers: list[int]) -> str:
    """Adds one number after the other: 3, 5, 9 -> `3+5=8`, `8+9=17`."""
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        lines.append(f"{total}+{number}={total + number}")
        total += number
    return "\n".join(lines)


def _numbers(rng: Random, easy: bool, room: int = STEPS) -> Context:
    largest = 9 if easy or rng.random() < 0.6 else 30
    numbers = [rng.randint(1, largest) for _ in range(rng.randint(3, 6 if easy else 24))]
    while len(steps(numbers)) > room:
        numbers.pop()
    return Context(numbers)


def _fewer(rng: Random, easy: bool) -> Context:
    return _numbers(rng, easy, STEPS - 20)  # which the closing words take


def _add_all(rng: Random, context: Context) -> Turn:
    numbers = context.data
    texts = [str(number) for number in numbers]
    listed = rng.choice(SEPARATORS if len(numbers) <= 8 else SEPARATORS[:3]).join(texts)
    question = vary(rng, rng.choice(QUESTIONS).format(listed))
    return Turn(question, steps(numbers), str(sum(numbers)), f"sum:{'+'.join(texts)}")


def _add_some(rng: Random, context: Context) -> Turn:
    """The same question, thinking cut after any character: the sum if it is there, else how far the steps got."""
    turn = _add_all(rng, context)
    cut = len(turn.thought) if rng.random() < 0.15 else rng.randint(1, len(turn.thought))
    said = turn.thought[:cut]
    done = sum(said.startswith(steps(context.data[: n + 1])) for n in range(1, len(context.data)))  # whole steps
    answer = turn.answer if done == len(context.data) - 1 else f"I got to {sum(context.data[: done + 1])}."
    return replace(turn, answer=answer, given=(said, CLOSING))


SHORT = (ADD_2, ADD_3, RECALL, TOOL_CITY)


def _short(rng: Random, easy: bool) -> Context:
    task = rng.choice(SHORT)
    context = task.context(rng, easy)
    return replace(context, data=(task, context))


def _think_less(rng: Random, context: Context) -> Turn:
    """A short question, thinking cut between two tokens; the answer is that of no thinking."""
    task, inner = context.data
    turn = task.ask(rng, inner)
    pieces = PIECES.findall(turn.thought)
    return replace(turn, given=("".join(pieces[: rng.randint(1, len(pieces))]), CLOSING))


LONG_SUM = Task("long_sum", _numbers, _add_all, modes=(True,), limit=256)
CLOSED_SUM = Task("closed_sum", _fewer, _add_some, modes=(True,))
CLOSED_THOUGHT = Task("closed_thought", _short, _think_less, modes=(True,))
