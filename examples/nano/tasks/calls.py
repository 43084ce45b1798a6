"""Calls where several tools are offered or wanted, with arguments of every type; and questions that need none."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from tasks.functions import ALARM, FUNCTIONS, HEAT, LIGHT, MOVE, POINT, TIME, TYPED, WEATHER, Function
from tasks.items import Call, Context, Task, Turn, join, vary
from tasks.itself import GREETING, IDENTITY
from tasks.numbers import ADD_1, ADD_2
from tasks.tools import tool_call

ALL = tuple(FUNCTIONS.values())
SMALL = (WEATHER, TIME, HEAT)  # definitions short enough to stand with another one in a row of the training
REPEATED = (WEATHER, TIME, LIGHT, ALARM, MOVE, POINT)  # one wants several calls of these


def offer(rng: Random, functions: Sequence[Function]) -> Context:
    """These functions in any order."""
    return Context(tools=tuple(rng.choice(f.tools) for f in rng.sample(functions, len(functions))))


def _one_of(rng: Random, functions: Sequence[Function] = ALL) -> Context:
    return offer(rng, (rng.choice(functions),))


def _two_or_three(rng: Random, easy: bool) -> Context:
    if not easy and rng.random() < 0.3:
        return offer(rng, SMALL)
    first = rng.choice(SMALL)
    return offer(rng, (first, rng.choice([function for function in ALL if function is not first])))


def _one_or_two(rng: Random, easy: bool) -> Context:
    return _one_of(rng) if easy or rng.random() < 0.5 else offer(rng, rng.sample(SMALL, 2))


def offered(context: Context) -> list[Function]:
    return [FUNCTIONS[tool["function"]["name"]] for tool in context.tools]


def _clause(text: str) -> str:
    return text[0].lower() + text[1:-1]


def _words(calls: Sequence[Call]) -> list[tuple[str, ...]]:
    return [FUNCTIONS[name].words(arguments) for name, arguments in calls]


def question_for(rng: Random, calls: Sequence[Call]) -> str:
    """What one says to have these calls made: cities joined in one question, everything else as joined clauses."""
    names = {name for name, _ in calls}
    words = _words(calls)
    if names in ({WEATHER.name}, {TIME.name}):
        return rng.choice(FUNCTIONS[names.pop()].questions).format(join([city for (city,) in words]))
    texts = [rng.choice(FUNCTIONS[name].questions).format(*w) for (name, _), w in zip(calls, words, strict=True)]
    joined = join([_clause(text) for text in texts])
    return joined[0].upper() + joined[1:] + texts[-1][-1]


def thought_of(calls: Sequence[Call]) -> str:
    return " ".join(FUNCTIONS[name].thought.format(*w) for (name, _), w in zip(calls, _words(calls), strict=True))


def answer_of(calls: Sequence[Call]) -> str:
    return "\n".join(tool_call(*call) for call in calls)


def _asked(rng: Random, context: Context, calls: tuple[Call, ...]) -> Turn:
    question = question_for(rng, calls)
    key = f"calls:{question}:{','.join(tool['function']['description'] for tool in context.tools)}"
    return Turn(vary(rng, question), thought_of(calls), answer_of(calls), key, calls)


def _one(rng: Random, context: Context) -> Turn:
    function = rng.choice(offered(context))
    return _asked(rng, context, ((function.name, function.draw(rng)),))


def draw_calls(rng: Random, context: Context) -> tuple[Call, ...]:
    """A call of each offered function; if that is one, two calls about different things, and of cities up to three."""
    functions = offered(context)
    if len(functions) > 1:
        return tuple((function.name, function.draw(rng)) for function in rng.sample(functions, len(functions)))
    (function,) = functions
    count = rng.randint(2, 3) if function in (WEATHER, TIME) else 2
    found: dict[str, Call] = {}
    while len(found) < count:
        arguments = function.draw(rng)
        found.setdefault(str(next(iter(arguments.values()))), (function.name, arguments))
    return tuple(found.values())


def _several(rng: Random, context: Context) -> Turn:
    return _asked(rng, context, draw_calls(rng, context))


def results_of(rng: Random, calls: Sequence[Call]) -> tuple[list[str], list[str]]:
    """What the tools return, and the sentences that report it."""
    pairs = [FUNCTIONS[name].result(rng, arguments) for name, arguments in calls]
    return [result for result, _ in pairs], [report for _, report in pairs]


def read_thought(results: Sequence[str]) -> str:
    return " ".join(f"The tool says {result}." for result in results)


def _then(rng: Random, context: Context, turn: Turn) -> Turn:
    """After calls their results and the report, after a report the next question."""
    if not turn.calls:
        return _one(rng, context)
    results, reports = results_of(rng, turn.calls)
    question = "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
    return Turn(question, read_thought(results), " ".join(reports), f"results:{' '.join(reports)}")


# --- no call ---------------------------------------------------------------------------------------------------------

PLAIN = (ADD_1, ADD_2, IDENTITY, GREETING)
NOT_OFFERED = "I have no tool for {}."


def _none(rng: Random, context: Context) -> Turn:
    """A question that needs no tool, or one that no offered tool fits."""
    if rng.random() < 0.6:
        turn = rng.choice(PLAIN).ask(rng, Context())
        return replace(turn, thought=f"I need no tool.\n{turn.thought}")
    names = [function.name for function in offered(context)]
    function = FUNCTIONS[rng.choice([name for name in FUNCTIONS if name not in names])]
    question = rng.choice(function.questions).format(*function.words(function.draw(rng)))
    answer = NOT_OFFERED.format(function.what)
    return Turn(vary(rng, question), "No tool fits.", answer, f"none:{question}:{','.join(names)}")


def _several_offered(rng: Random, easy: bool) -> Context:
    return _one_of(rng, REPEATED) if easy or rng.random() < 0.6 else offer(rng, rng.sample(SMALL, 2))


CHOOSE_TOOL = Task("choose_tool", _two_or_three, _one, _then)
TYPED_CALL = Task("typed_call", lambda rng, easy: _one_of(rng, TYPED), _one, _then)
SEVERAL_CALLS = Task("several_calls", _several_offered, _several, _then)
NO_CALL = Task("no_call", _one_or_two, _none)
