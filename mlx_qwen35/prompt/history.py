"""A history as clients send it -> as chat templates read it: one system message, results in the order of the calls."""

import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

_PACKAGE = __name__.partition(".")[0]
_BLANK_LINE = "\n\n"
Message = dict[str, Any]


def arguments_of(text: str) -> Mapping[str, Any]:
    """The arguments of a call from the JSON text that clients send back.

    A blank text is no arguments. A text that is no JSON object becomes one parameter, `arguments`. A RuntimeWarning
    tells of it.
    """
    if not text.strip():
        return {}
    try:
        parsed = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        return parsed
    _warn(
        "the arguments of an earlier tool call are text that is no JSON object. The model reads that text as one "
        "parameter named arguments"
    )
    return {"arguments": text}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _warn(text: str) -> None:
    """Warn at the line of the caller's program: Python then tells it once for each such line."""
    frame, level = sys._getframe(), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def settled(messages: Sequence[Message]) -> list[Message]:
    """Checked messages, their system messages joined into the first one, tool results in the order of their calls.

    Raises InputError (messages_invalid) for a tool_call_id that no call of the assistant's message before it has, and
    for one that two calls or two results have.
    """
    numbered = list(enumerate(messages))
    system = [message for message in messages if message["role"] == "system"]
    rest = [(number, message) for number, message in numbered if message["role"] != "system"]
    return [*_one_system(system), *_in_order(rest)]


# --- system messages --------------------------------------------------------------------------------------------------


def _one_system(messages: list[Message]) -> list[Message]:
    """The first system message with the contents of the others behind its own, a blank line between."""
    if len(messages) < 2:
        return messages
    contents = [message["content"] for message in messages if not _is_blank(message["content"])]
    joined: Any
    if all(isinstance(content, str) for content in contents):
        joined = _BLANK_LINE.join(contents)
    else:
        joined = []
        for content in contents:
            between = [{"type": "text", "text": _BLANK_LINE}] if joined else []
            joined += [*between, *([{"type": "text", "text": content}] if isinstance(content, str) else content)]
    return [{**messages[0], "content": joined}]


def _is_blank(content: str | list[Any]) -> bool:
    return not (content.strip() if isinstance(content, str) else content)


# --- tool results -----------------------------------------------------------------------------------------------------


def _in_order(numbered: Sequence[tuple[int, Message]]) -> list[Message]:
    """The messages with each run of tool results in the order of the calls that they answer.

    Results without an id stay where they are. Calls without a result are fine.
    """
    out: list[Message] = []
    places: dict[str, int] = {}  # of the calls of the last assistant's message, by id
    answered: set[str] = set()
    start = 0  # of the run of results
    for number, message in numbered:
        if message["role"] != "tool":
            out[start:] = _sorted(out[start:], places)
            start = len(out) + 1
        if message["role"] == "assistant":
            places, answered = _places(number, message), set()
        if message["role"] == "tool" and (call := _call_id(number, message)):
            _check_result(number, call, places, answered)
            answered.add(call)
        out.append(message)
    out[start:] = _sorted(out[start:], places)
    return out


def _sorted(results: Sequence[Message], places: Mapping[str, int]) -> list[Message]:
    with_id = (result for result in results if result.get("tool_call_id"))
    named = iter(sorted(with_id, key=lambda result: places[result["tool_call_id"]]))
    return [next(named) if result.get("tool_call_id") else result for result in results]


def _places(number: int, message: Message) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, call in enumerate(message.get("tool_calls") or []):
        name = call.get("id")
        if not isinstance(name, str | None):
            raise _refused(f"the id of messages[{number}].tool_calls[{place}] must be text, got {shown(name)}")
        if name in places:
            raise _refused(f"each call of messages[{number}] must have an id of its own; {shown(name)} is there twice")
        if name:
            places[name] = place
    return places


def _call_id(number: int, message: Message) -> str | None:
    name = message.get("tool_call_id")
    if not isinstance(name, str | None):
        raise _refused(f"tool_call_id of messages[{number}] must be text, got {shown(name)}")
    return name


def _check_result(number: int, call: str, places: Iterable[str], answered: set[str]) -> None:
    if call not in places:
        known = ", ".join(map(shown, places)) or "none"
        raise _refused(
            f"tool_call_id of messages[{number}] must be the id of a call in the assistant's message before it "
            f"({known}), got {shown(call)}"
        )
    if call in answered:
        raise _refused(f"each call must have one result; messages[{number}] is another one of {shown(call)}")


def _refused(message: str) -> InputError:
    return InputError("messages_invalid", message)
