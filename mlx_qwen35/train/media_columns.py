"""Images and videos of a row: those that a column lists beside the messages, and where their files are."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.fetch import is_remote
from mlx_qwen35.prompt.parts import kind_of
from mlx_qwen35.values import shown

KINDS = {"image": ("images", "image"), "video": ("videos", "video")}  # the names of a column; one source or a list
Message = dict[str, Any]


def invalid(rule: str) -> InputError:
    """The error for a row that breaks a rule. Who has read the row adds its place."""
    return InputError("data_invalid", rule)


def columns_of(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Kind -> the sources that a row's column lists. InputError (data_invalid) where it has two such columns."""
    found: dict[str, list[Any]] = {}
    for kind, names in KINDS.items():
        given = [name for name in names if values.get(name) is not None]
        if len(given) > 1:
            raise invalid(f"a row must list its {names[0]} once, got {' and '.join(given)}")
        if given:
            value = values[given[0]]
            found[kind] = [_source(one) for one in (value if isinstance(value, list | tuple) else [value])]
    return {kind: sources for kind, sources in found.items() if sources}


def _source(value: Any) -> Any:
    """A source; of {"path": ..., "bytes": null}, as tables of Hugging Face have it, the path."""
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return value["path"]
    return value


def placed(kind: str, sources: Sequence[Any], messages: Sequence[Message]) -> list[Message]:
    """The messages with these sources at their places, in order.

    The places are the bare parts {"type": "image"}; where there are none, <image> in the texts of users; where there
    are none of these, the beginning of the first user's message. InputError (data_invalid) unless there are as many.
    """
    parts = [part for message in messages for part in _parts(message) if kind_of(part) == kind]
    bare = sum(set(part) == {"type"} for part in parts)
    if bare < len(parts) and not bare:
        raise invalid(f"a row must name its {kind}s once: in the column beside the messages, or in their parts")
    if not bare:
        messages, bare = _from_tags(kind, messages)
    if not bare:
        user = next((i for i, message in enumerate(messages) if message["role"] == "user"), -1)
        own = [{"type": kind}] * len(sources)
        messages = [_with(message, [*own, *_parts(message)]) if i == user else message
                    for i, message in enumerate(messages)]  # fmt: skip
        bare = len(sources)
    if bare != len(sources):
        raise invalid(f"there must be one {kind} for each place in the messages; got {len(sources)} and {bare}")
    queue = iter(sources)
    return [
        _with(message, [{"type": kind, kind: next(queue)} if part == {"type": kind} else part for part in content])
        if isinstance(content := message.get("content"), list)
        else message
        for message in messages
    ]


def _parts(message: Message) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []


def _with(message: Message, parts: list[Any]) -> Message:
    return {**message, "content": parts}


def _from_tags(kind: str, messages: Sequence[Message]) -> tuple[list[Message], int]:
    """The messages with a bare part in the place of each tag in a user's text, and how many there are."""
    tag, out, count = f"<{kind}>", [], 0
    for message in messages:
        texts = [part.get("text") for part in _parts(message) if isinstance(part, Mapping)]
        found = sum(text.count(tag) for text in texts if isinstance(text, str)) if message["role"] == "user" else 0
        count += found
        split = [piece for part in _parts(message) for piece in _split(part, tag, kind)]
        out.append(_with(message, split) if found else message)
    return out, count


def _split(part: Any, tag: str, kind: str) -> list[Any]:
    if not isinstance(part, Mapping) or not isinstance(text := part.get("text"), str):
        return [part]
    parts: list[Any] = []
    for i, piece in enumerate(text.split(tag)):
        parts += [{"type": kind}] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


# --- where files are -------------------------------------------------------------------------------------------------


def located(messages: Sequence[Message], folder: Path, urls: bool) -> list[Message]:
    """The messages with paths that begin at the folder. InputError (data_invalid) for a URL, unless `urls`."""
    return [
        _with(message, [_located(part, folder, urls) if kind_of(part) else part for part in content])
        if isinstance(content := message.get("content"), list)
        else message
        for message in messages
    ]


def _located(part: Mapping[str, Any], folder: Path, urls: bool) -> dict[str, Any]:
    kind = kind_of(part)
    names = (kind, f"{kind}_url", "url", "path")
    return {name: _found(value, folder, urls) if name in names else value for name, value in part.items()}


def _found(value: Any, folder: Path, urls: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _found(inner, folder, urls) if name == "url" else inner for name, inner in value.items()}
    if isinstance(value, list | tuple):  # the frames of a video
        return [_found(one, folder, urls) for one in value]
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if is_remote(text) and not text.startswith("data:"):
        if not urls:
            raise invalid(f"images and videos must be files or data: URIs, got {shown(text)}. Save it in the folder")
        return value
    return value if text.startswith(("data:", "file:")) else os.path.join(folder, os.path.expanduser(text))
