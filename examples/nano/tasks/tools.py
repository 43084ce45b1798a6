"""One call of a function of a city, and the report of its result."""

import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from tasks.items import Context, Task, Turn, vary
from tasks.names import CITIES, any_place, new_name


def city_tool(name: str, description: str) -> dict[str, Any]:
    """A tool of the one kind the model knows: a function of a `city`."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": city}}


WEATHER_TOOLS = tuple(
    city_tool("get_weather", text)
    for text in ("Get the weather in a city", "Get the current weather", "The weather of a city", "Weather")
)

TIME_TOOLS = tuple(
    city_tool("get_time", text) for text in ("Get the time in a city", "Get the current time", "The time in a city")
)

WEATHER_QUESTIONS = (
    "What is the weather in {}?",
    "What is the weather like in {}?",
    "How is the weather in {}?",
    "What's the weather in {}?",
    "Tell me the weather in {}.",
)
TIME_QUESTIONS = ("What time is it in {}?", "What is the time in {}?", "Tell me the time in {}.")
SKIES = ("sunny", "cloudy", "rainy", "windy")


def _tools(rng: Random, easy: bool) -> Context:
    weather, time = rng.choice(WEATHER_TOOLS), rng.choice(TIME_TOOLS)
    sets = ((weather,), (weather,), (weather,), (time,), (weather, time), (time, weather))
    return Context(None, tools=rng.choice(sets))


def tool_call(function: str, arguments: Mapping[str, Any]) -> str:
    """The call as the model writes it, and as the chat template does: objects and lists in JSON, the rest by str."""
    texts = ((key, json.dumps(v) if isinstance(v, dict | list) else str(v)) for key, v in arguments.items())
    parameters = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts)
    return f"<tool_call>\n<function={function}>\n{parameters}</function>\n</tool_call>"


def _call(place: Callable[[Random], str]) -> Callable[[Random, Context], Turn]:
    def ask(rng: Random, context: Context) -> Turn:
        function = rng.choice(context.tools)["function"]["name"]
        city = place(rng)
        questions = WEATHER_QUESTIONS if function == "get_weather" else TIME_QUESTIONS
        question = vary(rng, rng.choice(questions).format(city))
        what = function.removeprefix("get_")
        key = f"tool:{city}:{question}:{len(context.tools)}" if city in CITIES else f"tool:{city}"
        call = (function, {"city": city})
        return Turn(question, f"I need the {what} in {city}.", tool_call(*call), key, (call,))

    return ask


def city_result(rng: Random, function: str, city: str) -> tuple[str, str]:
    """A tool's result and the sentence that reports it."""
    if function == "get_time":
        clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
        return clock, f"It is {clock} in {city}."
    degrees, sky = rng.randint(-9, 39), rng.choice(SKIES)
    return f"{degrees} degrees, {sky}", f"It is {degrees} degrees and {sky} in {city}."


def _tool_result(rng: Random, easy: bool) -> Context:
    context = _tools(rng, easy)
    city = rng.choice(CITIES)
    turn = _call(lambda _: city)(rng, context)
    function = "get_time" if "get_time" in turn.answer else "get_weather"
    result, report = city_result(rng, function, city)
    call = {"type": "function", "function": {"name": function, "arguments": {"city": city}}}
    history = (
        {"role": "user", "content": turn.question},
        {"role": "assistant", "content": "", "reasoning_content": turn.thought, "tool_calls": [call]},
        {"role": "tool", "content": result},
    )
    return Context((function, city, result, report), history=history, tools=context.tools)


def _report(rng: Random, context: Context) -> Turn:
    _, city, result, report = context.data
    return Turn(None, f"The tool says {result}.", report, f"report:{city}:{result}")


def _tool_again(rng: Random, context: Context, turn: Turn) -> Turn:
    """After a call the result and its report, after a report the next question."""
    if "<tool_call>" not in turn.answer:
        return _call(any_place)(rng, context)
    function = "get_time" if "get_time" in turn.answer else "get_weather"
    city = turn.answer.split("<parameter=city>\n")[1].split("\n")[0]
    result, report = city_result(rng, function, city)
    key = f"report:{city}:{result}"
    return Turn(f"<tool_response>\n{result}\n</tool_response>", f"The tool says {result}.", report, key)


TOOL_CITY = Task("tool_city", _tools, _call(lambda rng: rng.choice(CITIES)), _tool_again)
TOOL_NAME = Task("tool_name", _tools, _call(new_name), _tool_again)
TOOL_REPORT = Task("tool_report", _tool_result, _report, _tool_again)
