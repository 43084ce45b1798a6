"""The form of tool calls, as a chain of states: envelope, names, values, closers.

A call is

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

with the parameters in the order of the tool's schema; optional ones may be left out. The fixed texts need no grammar. A
value that is a string is raw (raw.py), any other one is held to its schema by a small grammar of its own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.engine.constraints.compiler import Compiler
from mlx_qwen35.engine.constraints.forms import check_size
from mlx_qwen35.engine.constraints.parameters import CLOSER, Parameters, Value, check_name, parameters_of
from mlx_qwen35.engine.constraints.raw import Raw
from mlx_qwen35.engine.constraints.states import Either, End, Next, State, Texts, Token
from mlx_qwen35.errors import InputError

OPENER, CLOSING = "<tool_call>", "</tool_call>"
_NAME = "/[A-Za-z_][A-Za-z0-9_.-]{0,63}/"  # of a parameter that the schema does not name

Start = Callable[[Next], State]  # makes the first state of a value, of what follows it


@dataclass(frozen=True)
class Tool:
    """A function that may be called."""

    name: str
    strict: bool
    schema: Any  # of its arguments


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """The functions of a list of tools in OpenAI's form. InputError for another form."""
    found = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError("option_invalid", "tools must be a list of functions, each with a name")
        strict = function.get("strict", tool.get("strict"))
        found.append(Tool(function["name"], strict is True, function.get("parameters")))
    return found


class Calls:
    """The calls that an answer may hold.

    Args:
        compiler: of the processor; InputError if its tokenizer has no tokens for the envelope.
        tools: the functions that may be called.
        parallel: whether another call may follow one.
    """

    def __init__(self, compiler: Compiler, tools: Sequence[Tool], parallel: bool):
        vocabulary = compiler.vocabulary
        if not {OPENER, CLOSING} <= set(vocabulary.added):
            raise InputError("option_conflict", "tool calls need a tokenizer with the tokens of the form of Qwen3.5")
        self._vocabulary, self._parallel, self._compiler = vocabulary, parallel, compiler
        self.opener, self._closing = vocabulary.added[OPENER], vocabulary.added[CLOSING]
        tails = [_Tail(self, tool) for tool in tools]
        for tail in tails:
            check_name(tail.tool.name, "a tool")
        names = {f"\n<function={tail.tool.name}>\n".encode(): tail.start for tail in tails}
        self._names = Texts(vocabulary, names)

    def start(self) -> State:
        """The state before <tool_call>."""
        return Token(self._vocabulary, self.opener, self.inside)

    def inside(self) -> State:
        """The state behind <tool_call>."""
        return self._names

    def close(self) -> State:
        """The state before </tool_call>."""
        return Token(self._vocabulary, self._closing, self._called)

    def _called(self) -> State:
        end = End(self._vocabulary)
        return Either([end, Texts(self._vocabulary, {b"\n": self.start})]) if self._parallel else end

    def texts(self, texts: Mapping[str, Next]) -> State:
        """One of several texts; a token may join the last line end with the first of a value."""
        return Texts(self._vocabulary, {text.encode(): then for text, then in texts.items()}, onward=True)

    def value(self, value: Value, what: str) -> Start:
        """What makes the state before a value; behind it the line that closes it has come too."""
        if value.free:
            return lambda then: Raw(self._compiler.raw, then)
        if not value.rules and not value.whole:
            return lambda then: self.texts({text + CLOSER: then for text in value.texts})
        return self._compiler.grammar(value.lark, what).start

    def other_name(self, names: Sequence[str], what: str) -> Start:
        """What makes the state before the opening line of a parameter with none of these names."""
        others = " & ".join([_NAME, *(f"~{json.dumps(name)}" for name in names)])
        return self._compiler.grammar(f'start: LINE\nLINE: "<parameter=" ({others}) ">\\n"', what).start


class _Tail:
    """The states of one tool's call behind its name."""

    def __init__(self, calls: Calls, tool: Tool):
        what = f"tool {tool.name}"
        self.tool, self._calls = tool, calls
        check_size(f"{what}: parameters", tool.schema)
        self._parameters: Parameters = parameters_of(tool.schema, tool.strict, what)
        self._names = list(self._parameters.values)
        values = self._parameters.values.items()
        self._values = [calls.value(value, f"{what}: parameter {name}") for name, value in values]
        self._extra: Start | None = None
        if (extra := self._parameters.extra) is not None:
            self._extra = calls.value(extra, f"{what}: additionalProperties")
            self._extra_name = calls.other_name(self._names, f"{what}: additionalProperties")
        self._made: dict[int, State] = {}

    def start(self) -> State:
        return self._from(0)

    def _from(self, place: int) -> State:
        """The state in which the parameters from this place on may come."""
        if place not in self._made:
            self._made[place] = self._calls.texts(self._texts(place))
        may_be_extra = self._extra and not any(name in self._parameters.required for name in self._names[place:])
        return Either([self._made[place], self._extra_state()]) if may_be_extra else self._made[place]

    def _texts(self, place: int) -> dict[str, Next]:
        texts: dict[str, Next] = {}
        for i in range(place, len(self._names)):
            texts[f"<parameter={self._names[i]}>\n"] = self._behind_name(i)
            if self._names[i] in self._parameters.required:
                return texts
        return {**texts, "</function>\n": self._calls.close}

    def _behind_name(self, place: int) -> Next:
        return lambda: self._values[place](lambda: self._from(place + 1))

    def _extra_state(self) -> State:
        extra, end = self._extra, len(self._names)
        assert extra
        return self._extra_name(lambda: extra(lambda: self._from(end)))
