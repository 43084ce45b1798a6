"""The functions that an agent may be offered: their schemas, how people ask for them, and what they return."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tasks.clips import DIRECTIONS
from tasks.items import join
from tasks.names import NAMES, any_place
from tasks.tools import TIME_QUESTIONS, TIME_TOOLS, WEATHER_QUESTIONS, WEATHER_TOOLS, city_result

LIGHTS = ("red", "green", "blue", "yellow")
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Function:
    """A function, how people ask for it, and what it returns.

    The first argument says what a call is about. `words` fill the questions and the thought; `result` is what comes
    back and the sentence that reports it.
    """

    what: str  # it is about
    tools: tuple[dict[str, Any], ...]  # the definition, with one description or another
    draw: Callable[[Random], dict[str, Any]]
    words: Callable[[Arguments], tuple[str, ...]]
    questions: tuple[str, ...]
    thought: str
    result: Callable[[Random, Arguments], tuple[str, str]]

    @property
    def name(self) -> str:
        return self.tools[0]["function"]["name"]


def _definitions(name: str, descriptions: Sequence[str], properties: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return tuple(
        {"type": "function", "function": {"name": name, "description": text, "parameters": schema}}
        for text in descriptions
    )


def _done(report: Callable[[Arguments], str]) -> Callable[[Random, Arguments], tuple[str, str]]:
    return lambda rng, arguments: ("done", report(arguments))


def _clock(arguments: Arguments) -> str:
    return f"{arguments['hour']}:{arguments['minute']:02d}"


def _draw_degrees(rng: Random) -> float | int:
    return rng.randint(10, 30) + (0.5 if rng.random() < 0.5 else 0)


def _switched(arguments: Arguments) -> tuple[str, str]:
    return "on" if arguments["on"] else "off", arguments["colour"]


def _place(arguments: Arguments) -> tuple[str, str]:
    return str(arguments["at"]["x"]), str(arguments["at"]["y"])


def _steps(arguments: Arguments) -> tuple[str, str]:
    return str(arguments["steps"]), arguments["to"]


_POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}

WEATHER = Function(
    what="the weather",
    tools=WEATHER_TOOLS,
    draw=lambda rng: {"city": any_place(rng)},
    words=lambda a: (a["city"],),
    questions=WEATHER_QUESTIONS,
    thought="I need the weather in {}.",
    result=lambda rng, a: city_result(rng, "get_weather", a["city"]),
)
TIME = Function(
    what="the time",
    tools=TIME_TOOLS,
    draw=lambda rng: {"city": any_place(rng)},
    words=lambda a: (a["city"],),
    questions=TIME_QUESTIONS,
    thought="I need the time in {}.",
    result=lambda rng, a: city_result(rng, "get_time", a["city"]),
)
LIGHT = Function(
    what="lights",
    tools=_definitions(
        "set_light",
        ("Switch a light", "Turn a light on or off"),
        {"colour": {"type": "string", "enum": list(LIGHTS)}, "on": {"type": "boolean"}},
    ),
    draw=lambda rng: {"colour": rng.choice(LIGHTS), "on": rng.random() < 0.5},
    words=_switched,
    questions=(
        "Turn {} the {} light.",
        "Switch {} the {} light.",
        "Please turn {} the {} light.",
        "Please switch {} the {} light.",
    ),
    thought="I turn {} the {} light.",
    result=_done(lambda a: "The {1} light is {0}.".format(*_switched(a))),
)
HEAT = Function(
    what="heat",
    tools=_definitions("set_heat", ("Set the heat", "Heat the room"), {"degrees": {"type": "number"}}),
    draw=lambda rng: {"degrees": _draw_degrees(rng)},
    words=lambda a: (str(a["degrees"]),),
    questions=("Heat the room to {} degrees.", "Set the heat to {}.", "Please heat to {} degrees."),
    thought="I set the heat to {}.",
    result=_done(lambda a: f"The heat is {a['degrees']} degrees."),
)
ALARM = Function(
    what="alarms",
    tools=_definitions(
        "set_alarm", ("Set an alarm", "Wake the user"), {"hour": {"type": "integer"}, "minute": {"type": "integer"}}
    ),
    draw=lambda rng: {"hour": rng.randint(0, 23), "minute": rng.choice((0, 15, 30, 45, rng.randint(0, 59)))},
    words=lambda a: (_clock(a),),
    questions=("Wake me at {}.", "Set an alarm for {}.", "Please wake me at {}."),
    thought="I set an alarm for {}.",
    result=_done(lambda a: f"The alarm is set for {_clock(a)}."),
)
MOVE = Function(
    what="moving",
    tools=_definitions(
        "move",
        ("Move", "Move some steps"),
        {"to": {"type": "string", "enum": list(DIRECTIONS)}, "steps": {"type": "integer"}},
    ),
    draw=lambda rng: {"to": rng.choice(list(DIRECTIONS)), "steps": rng.randint(1, 20)},
    words=_steps,
    questions=("Move {} {}.", "Go {} {}.", "Please move {} {}."),
    thought="I move {} {}.",
    result=_done(lambda a: "I moved {} {}.".format(*_steps(a))),
)
POINT = Function(
    what="drawing",
    tools=_definitions("draw", ("Draw a point", "Draw"), {"at": _POINT}),
    draw=lambda rng: {"at": {"x": rng.randint(0, 20), "y": rng.randint(0, 20)}},
    words=_place,
    questions=("Draw a point at {}, {}.", "Draw a point at ({}, {}).", "Please draw a point at {}, {}."),
    thought="I draw a point at {}, {}.",
    result=_done(lambda a: "There is a point at {}, {}.".format(*_place(a))),
)
CALL = Function(
    what="calling",
    tools=_definitions("call", ("Call people", "Call"), {"names": {"type": "array", "items": {"type": "string"}}}),
    draw=lambda rng: {"names": rng.sample(NAMES, rng.randint(1, 3))},
    words=lambda a: (join(a["names"]),),
    questions=("Call {}.", "Please call {}.", "Call up {}."),
    thought="I call {}.",
    result=_done(lambda a: f"I called {join(a['names'])}."),
)
TYPED = (LIGHT, HEAT, ALARM, MOVE, POINT, CALL)
FUNCTIONS = {function.name: function for function in (WEATHER, TIME, *TYPED)}
