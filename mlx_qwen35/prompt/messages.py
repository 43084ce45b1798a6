"""Messages and tools -> plain values of the usual form. Anything else is refused by its name, before it is used."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from numbers import Integral
from typing import Any

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.prompt.control import check_text
from mlx_qwen35.prompt.history import arguments_of, settled
from mlx_qwen35.prompt.parts import kind_of
from mlx_qwen35.values import flag, shown

DEPTH = 64  # of lists and mappings in each other
VALUES = 250_000  # in all messages and tools
MOST_TOOLS = 256
_BITS = 4096  # of a whole number: Python itself writes no more than 4,300 digits
_REASONING = ("reasoning_content", "thinking", "reasoning")  # programs' names for the reasoning of a message

_INSTEAD = {"tool_calls", "reasoning_content"}  # of content


class Plain:
    """Rebuilds values from the types of JSON and counts them: a template sees no objects with methods of their own."""

    def __init__(self) -> None:
        self.values = self.chars = 0

    def __call__(self, value: Any, *path: Any, depth: int = 0) -> Any:
        """The value. path: where it is, for errors; depth: in how many lists and mappings."""
        self.values += 1
        if self.values > VALUES:
            raise _refused(f"messages and tools must hold at most {VALUES:,} values; {_name(path)} goes beyond")
        if depth > DEPTH:
            raise _refused(f"lists and mappings must be nested at most {DEPTH} deep; {_name(path[:2])} goes deeper")
        if isinstance(value, Mapping):
            named = [(self._key(key, path), item) for key, item in value.items()]
            return {key: self(item, *path, key, depth=depth + 1) for key, item in named}
        if isinstance(value, list | tuple):
            return [self(item, *path, i, depth=depth + 1) for i, item in enumerate(value)]
        return self._scalar(value, path)

    def _key(self, key: Any, path: tuple) -> str:
        if not isinstance(key, str):
            raise _refused(f"the names in {_name(path)} must be text, got {shown(key)} ({type(key).__name__})")
        return self._text(key, path)

    def _text(self, text: str, path: tuple) -> str:
        check_text(text, lambda: _name(path))
        self.chars += len(text)
        return str.__str__(text)

    def _scalar(self, value: Any, path: tuple) -> Any:
        if isinstance(value, str):
            return self._text(value, path)
        if value is None:
            return None
        if isinstance(value, bool | np.bool_):
            return bool(value)
        if isinstance(value, Integral):
            if int(value).bit_length() > _BITS:
                raise _refused(f"{_name(path)} must be a number of at most {_BITS:,} bits")
            return int(value)
        if isinstance(value, float | np.floating):
            if not math.isfinite(value):
                raise _refused(f"{_name(path)} must be a finite number, got {value}")
            return float(value)
        raise _refused(f"{_name(path)} must be what JSON can hold, got {type(value).__name__}")


def _name(path: tuple) -> str:
    """messages[0].content, of ("messages", 0, "content")."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:40]}" for part in path)[1:]


def _refused(message: str) -> InputError:
    return InputError("messages_invalid", message)


def check_messages(messages: Sequence[Mapping[str, Any]], plain: Plain) -> list[dict[str, Any]]:
    """The messages in plain values, as templates read them, see history.py. Parts with an image or a video stay as
    they are.
    """
    if not isinstance(messages, list | tuple):
        raise _refused(f"messages must be a list, got {type(messages).__name__}")
    return settled([_message(message, i, plain) for i, message in enumerate(messages)])


def _message(message: Any, number: int, plain: Plain) -> dict[str, Any]:
    name = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise _refused(f'a message must be like {{"role": "user", "content": ...}}, got {shown(message)} as {name}')
    checked = plain({key: value for key, value in message.items() if key != "content"}, "messages", number)
    if not isinstance(checked.get("role"), str):
        raise _refused(f'the role of {name} must be text, as "user" or "assistant", got {_got(checked, "role")}')
    _refuse_functions(checked, name)
    if checked["role"] == "developer":
        checked["role"] = "system"
    _check_calls(checked, number, plain)
    _name_reasoning(checked, name)
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = [_part(part, ("messages", number, "content", i), plain) for i, part in enumerate(content)]
    elif isinstance(content, str):
        content = plain(content, "messages", number, "content")
    elif content is not None:
        raise _refused(f"the content of {name} must be text or a list of parts, got {type(content).__name__}")
    elif checked["role"] != "assistant" or not ("content" in message or checked.keys() & _INSTEAD):
        raise _refused(f"{name} must have content, unless an assistant calls or thinks; got {_got(message, 'content')}")
    fields = {"role": checked.pop("role"), "content": content, **checked}
    return {key: value for key, value in fields.items() if value is not None}  # a template takes None for a text


def _got(message: Mapping[str, Any], name: str) -> str:
    return type(message[name]).__name__ if name in message else "none"


def _part(part: Any, path: tuple[str | int, ...], plain: Plain) -> Any:
    if not isinstance(part, Mapping):
        rule = f'a part must be like {{"type": "text", "text": ...}}, got {type(part).__name__} as {_name(path)}'
        raise InputError("message_part_invalid", rule)
    if kind_of(part):
        return part
    checked = plain(part, *path)
    if not isinstance(checked.get("text", ""), str):
        got = type(checked["text"]).__name__
        raise InputError("message_part_invalid", f"the text of {_name(path)} must be text, got {got}")
    return checked


def _refuse_functions(message: Mapping[str, Any], name: str) -> None:
    """The form that calls had before tool_calls: a call in it would be lost in silence."""
    if message["role"] == "function":
        raise _refused(f'the role of {name} must be "tool" for the result of a call, got "function", which is outdated')
    if message.get("function_call") is not None:
        raise _refused(f"{name} must have its calls in tool_calls, a list; got function_call, which is outdated")


def _check_calls(message: Mapping[str, Any], number: int, plain: Plain) -> None:
    """Refuse calls of a wrong form. Arguments that are JSON text become a mapping."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None):
        raise _refused(f"tool_calls of messages[{number}] must be a list, got {type(calls).__name__}")
    for i, call in enumerate(calls or []):
        at = f"messages[{number}].tool_calls[{i}]"
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict):
            form = '{"function": {"name": ..., "arguments": {...}}}'
            raise _refused(f"{at} must be like {form}, got {type(function).__name__}")
        if not isinstance(function.get("name"), str):
            raise _refused(f"the name in {at} must be text, got {_got(function, 'name')}")
        given = function.get("arguments", {})
        if not isinstance(given, Mapping | str):
            raise _refused(f"the arguments in {at} must be a mapping or its JSON, got {type(given).__name__}")
        if isinstance(given, str):
            function["arguments"] = plain(arguments_of(given), "messages", number, "tool_calls", i, "arguments")


def _name_reasoning(message: dict[str, Any], name: str) -> None:
    """Give the reasoning of a message the two names that templates read."""
    given = [(key, message[key]) for key in _REASONING if message.get(key) is not None]
    for key, reasoning in given:
        if not isinstance(reasoning, str):
            raise _refused(f"{key} of {name} must be text, got {type(reasoning).__name__}")
    if given:
        message["reasoning_content"] = given[0][1]
        message["thinking"] = message.get("thinking") or given[0][1]


def check_template_options(options: Mapping[str, Any], plain: Plain) -> dict[str, Any]:
    """The options of a template in plain values; options that are None are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() & {"add_generation_prompt", "enable_thinking", "preserve_thinking"}:
        given[name] = flag(name, given[name])
    check_tools(given.get("tools", []))
    return {name: plain(value, name) for name, value in given.items()}


def check_tools(tools: Any) -> None:
    """InputError (option_invalid) unless these are functions in OpenAI's form, at most 256, each of another name."""
    if not isinstance(tools, list | tuple):
        raise InputError("option_invalid", f"tools must be a list of functions, got {type(tools).__name__}")
    if len(tools) > MOST_TOOLS:
        raise InputError("option_invalid", f"tools must be at most {MOST_TOOLS} functions, got {len(tools)}")
    names: set[str] = set()
    for i, tool in enumerate(tools):
        name = _check_tool(tool, f"tools[{i}]")
        if name in names:
            raise InputError("option_invalid", f"tools must have a name each; {shown(name)} is there twice")
        names.add(name)


def _check_tool(tool: Any, at: str) -> str:
    """The name of a tool."""
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        form = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
        raise InputError("option_invalid", f"{at} must be like {form}, got {shown(tool)}")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name.strip():
        raise InputError("option_invalid", f"the name of {at} must be text that is not blank, got {shown(name)}")
    if not isinstance(parameters, Mapping | None):
        raise InputError(
            "option_invalid", f"the parameters of {at} must be a JSON schema, a mapping; got {shown(parameters)}"
        )
    return name


def veiled(messages: Sequence[dict[str, Any]], veil: Callable[[list[str]], list[str]]) -> list[dict[str, Any]]:
    """The messages with veiled tags in users' texts, so that a template does not mistake one for its own.

    An assistant's content stays as it is: templates split its reasoning off at its tags.
    """
    return [{**message, **_veiled(message.get("content"), veil)} if message["role"] == "user" else message
            for message in messages]  # fmt: skip


def _veiled(content: Any, veil: Callable[[list[str]], list[str]]) -> dict[str, Any]:
    if not isinstance(content, list):
        return {"content": veil([content])[0]}
    parts: list[Any] = []
    for is_text, group in groupby(content, lambda part: isinstance(part.get("text"), str)):
        neighbours = list(group)
        if is_text:
            texts = veil([part["text"] for part in neighbours])
            neighbours = [{**part, "text": text} for part, text in zip(neighbours, texts, strict=True)]
        parts += neighbours
    return {"content": parts}
