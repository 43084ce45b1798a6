"""One row of training data, in any of its forms -> a conversation with the answers to learn, or a raw text.

The forms are those of mlx-lm: `messages`, `prompt` with `completion`, `text`. A prompt and a completion may be lists of
messages, as Hugging Face has them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.prompt.messages import check_tools
from mlx_qwen35.train.media_columns import KINDS, columns_of, invalid, located, placed
from mlx_qwen35.values import shown

FORMS = (("messages",), ("prompt", "completion"), ("text",))
ROLES = ("system", "developer", "user", "assistant", "tool")
READ = frozenset({
    "role", "content", "reasoning_content", "reasoning", "thinking", "tool_calls", "tool_call_id", "name", "weight",
    "function_call",  # to be refused
})  # fmt: skip
_REASONING_END = "</think>"
Message = dict[str, Any]


@dataclass(frozen=True)
class Talk:
    """A conversation. answers: the places of the assistant's messages that are learnt, in order."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None
    answers: Sequence[int]


@dataclass(frozen=True)
class Text:
    """A raw text, all of which is learnt. media: kind -> sources, in the order of its placeholders."""

    text: str
    media: Mapping[str, Sequence[Any]]


def read_form(values: Mapping[str, Any], folder: Path, urls: bool = False) -> tuple[Talk | Text, set[str]]:
    """What a row says, and the names of its columns that nothing reads.

    folder: that paths of images and videos are relative to. urls: whether they may be fetched from the network.
    Raises InputError (data_invalid) for a row of no form or of several, and for answers that cannot be learnt.
    """
    given = {name: value for name, value in values.items() if value is not None}
    forms = [names for names in FORMS if set(names) <= set(given)]
    if len(forms) != 1:
        listed = ", ".join("+".join(names) for names in (forms or FORMS))
        got = f"several: {listed}" if forms else f"{', '.join(map(shown, given)) or 'nothing'}; the forms are {listed}"
        raise invalid(f"a row must have one form, got {got}")
    media = columns_of(given)
    read = {*forms[0], *(name for kind in media for name in KINDS[kind]), "tools"}
    if "text" in forms[0]:
        return _text(given["text"], media, folder, urls), set(given) - read | ({"tools"} & set(given))
    told, first = _messages(given)
    for kind, sources in media.items():
        told = placed(kind, sources, told)
    told = located(told, folder, urls)
    tools = _tools(given.get("tools"))
    answers = _answers(told, first, tools)
    unread = {f"{forms[0][0]}.{name}" for message in told for name in message.keys() - READ}
    return Talk([_without(message, "weight") for message in told], tools, answers), set(given) - read | unread


def _text(text: Any, media: Mapping[str, Sequence[Any]], folder: Path, urls: bool) -> Text:
    if not isinstance(text, str) or not text.strip():
        raise invalid(f"text must be text that is not blank, got {shown(text)}")
    parts = [{"content": [{"type": kind, kind: source} for source in media[kind]]} for kind in media]
    own = {kind: located([part], folder, urls)[0]["content"] for kind, part in zip(media, parts, strict=True)}
    return Text(text, {kind: [part[kind] for part in found] for kind, found in own.items()})


def _messages(given: Mapping[str, Any]) -> tuple[list[Message], int]:
    """The messages of a row, and the place of the first whose answers may be learnt."""
    if "messages" in given:
        return _listed("messages", given["messages"]), 0
    sides = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = given[name]
        sides.append(_listed(name, [{"role": role, "content": value}] if isinstance(value, str) else value))
    return [*sides[0], *sides[1]], len(sides[0])


def _listed(name: str, value: Any) -> list[Message]:
    """Messages without the columns that are null, as tables of Hugging Face have them in every message and part."""
    if not isinstance(value, list | tuple) or not value:
        raise invalid(f"{name} must be a list of messages, got {shown(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            got = shown(message.get("role") if isinstance(message, Mapping) else message)
            raise invalid(f"{name}[{i}] must have a role, one of {', '.join(ROLES)}; got {got}")
    return [_without_null(message) for message in value]


def _without_null(message: Mapping[str, Any]) -> Message:
    own = {name: value for name, value in message.items() if value is not None or name == "content"}
    if isinstance(content := own.get("content"), list | tuple):
        own["content"] = [
            {name: value for name, value in part.items() if value is not None} if isinstance(part, Mapping) else part
            for part in content
        ]
    return own


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}


def _tools(tools: Any) -> Sequence[Any] | None:
    """tools: a list, or its JSON, as tables of Hugging Face have it; no tools are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise invalid(f"tools must be a list of functions, or its JSON: {error}") from error
    if tools is None:
        return None
    check_tools(tools)
    return tools or None


# --- answers ---------------------------------------------------------------------------------------------------------


def _answers(messages: Sequence[Message], first: int, tools: Sequence[Any] | None) -> list[int]:
    """The places of the answers that are learnt: those behind a user's message, unless their weight is 0."""
    if messages[-1]["role"] != "assistant":
        raise invalid(f"the last message must be an assistant's, got one of role {messages[-1]['role']}")
    query = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    found = [
        i for i, message in enumerate(messages)
        if i >= first and message["role"] == "assistant" and _weight(message, i) and i > query
    ]  # fmt: skip
    if not found:
        raise invalid("a row must have an answer to learn: an assistant's message behind a user's, not of weight 0")
    for i in found:
        _check_answer(messages[i], f"messages[{i}]", tools)
    return found


def _weight(message: Message, number: int) -> bool:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise invalid(f"the weight of messages[{number}] must be 0 or 1, got {shown(weight)}")
    return bool(weight)


def _check_answer(message: Message, name: str, tools: Sequence[Any] | None) -> None:
    """Refuse an answer that says nothing, shows an image or calls what it cannot."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        parts = content if isinstance(content, list) else [content]
        if wrong := [part for part in parts if not isinstance(part, Mapping) or not isinstance(part.get("text"), str)]:
            raise invalid(f"{name} is an answer, which must be text; got {shown(wrong[0])}")
        content = "".join(part["text"] for part in parts)
    calls = message.get("tool_calls") or []
    if not content.rpartition(_REASONING_END)[2].strip() and not calls:
        raise invalid(f"{name} is an answer, which must have text or calls; it has none")
    offered = [tool["function"]["name"] for tool in tools or []]
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or function.get("name") not in offered:
            raise invalid(f"{name} must call what the row's `tools` offer ({', '.join(offered) or 'none'}), "
                          f"got {shown(call)}")
        _check_arguments(function.get("arguments", {}), name)


def _check_arguments(arguments: Any, name: str) -> None:
    try:
        found = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except ValueError:
        found = None
    if not isinstance(found, Mapping):
        raise invalid(f"the arguments of a call in {name} must be an object or its JSON, got {shown(arguments)}")
