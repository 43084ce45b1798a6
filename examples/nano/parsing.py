"""A small reader of whole answers, for the scores of the agent tasks. It takes what the chat template writes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CALL = re.compile(
    r"<tool_call>\n<function=([^>\n]+)>\n((?:<parameter=[^>\n]+>\n.*?\n</parameter>\n)*)</function>\n</tool_call>", re.S
)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", re.S)


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...]


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """A value typed by its schema: a string stays, the rest is JSON, a boolean of any case; what is neither is text."""
    if schema.get("type") == "string":
        return text
    try:
        return json.loads(text.lower() if schema.get("type") == "boolean" else text)
    except ValueError:
        return text


def parse_answer(text: str, tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool = True) -> Answer:
    """Splits a whole answer into reasoning, content and, with tools, calls. thinking: it begins inside a thought."""
    reasoning, closed, content = text.partition("</think>") if thinking else ("", "", text)
    if thinking and not closed:
        content = ""
    calls = []
    schemas = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in tools or ()}
    for name, parameters in CALL.findall(content) if schemas else ():
        known = schemas.get(name, {})
        calls.append(ToolCall(name, {k: _value(v, known.get(k, {})) for k, v in PARAMETER.findall(parameters)}))
    content = CALL.sub("", content) if calls else content
    return Answer(reasoning.strip() or None, content.strip() or None, tuple(calls))
