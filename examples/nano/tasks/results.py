"""Answers made from what tools returned: a report of each result, or a comparison of two."""

from collections.abc import Sequence
from random import Random
from typing import Any

from tasks.calls import ALL, question_for, read_thought, results_of, thought_of
from tasks.functions import TIME, WEATHER, Function
from tasks.items import Call, Context, Task, Turn, vary
from tasks.names import CITIES

WARMER_QUESTIONS = (
    "Where is it warmer, in {} or in {}?",
    "Is it warmer in {} or in {}?",
    "Which city is warmer, {} or {}?",
)


def _history(rng: Random, question: str, calls: Sequence[Call], results: Sequence[str]) -> tuple[dict[str, Any], ...]:
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return (
        {"role": "user", "content": vary(rng, question)},
        {"role": "assistant", "content": "", "reasoning_content": thought_of(calls), "tool_calls": made},
        *({"role": "tool", "content": result} for result in results),
    )


def _known(rng: Random, function: Function, count: int) -> tuple[Call, ...]:
    return tuple((function.name, {"city": city}) for city in rng.sample(CITIES, count))


def _compared(rng: Random) -> Context:
    """The weather in two cities, and the question which of them is warmer."""
    calls = _known(rng, WEATHER, 2)
    while True:
        results, _ = results_of(rng, calls)
        degrees = [int(result.split()[0]) for result in results]
        if degrees[0] != degrees[1]:
            break
    cities = [arguments["city"] for _, arguments in calls]
    question = rng.choice(WARMER_QUESTIONS).format(*cities)
    answer = f"It is warmer in {cities[degrees.index(max(degrees))]}."
    return Context((results, answer), history=_history(rng, question, calls, results), tools=_tool(rng, WEATHER))


def _tool(rng: Random, function: Function) -> tuple[dict[str, Any], ...]:
    return (rng.choice(function.tools),)


def _reported(rng: Random, easy: bool) -> Context:
    """One call, or two about cities, and the question to report what they returned."""
    function = rng.choice(ALL)
    cities = function in (WEATHER, TIME)
    calls = _known(rng, function, 1 if easy else 2) if cities else ((function.name, function.draw(rng)),)
    results, reports = results_of(rng, calls)
    history = _history(rng, question_for(rng, calls), calls, results)
    return Context((results, " ".join(reports)), history=history, tools=_tool(rng, function))


def _returned(rng: Random, easy: bool) -> Context:
    return _compared(rng) if rng.random() < 0.4 else _reported(rng, easy)


def _report(rng: Random, context: Context) -> Turn:
    results, answer = context.data
    return Turn(None, read_thought(results), answer, f"results:{';'.join(results)}:{answer}")


FROM_RESULTS = Task("from_results", _returned, _report)
