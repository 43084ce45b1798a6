"""What the options that ask for a form of the answer may be. No grammar is made here, and nothing imported for one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

MOST_BYTES = 64 << 10  # of a schema, an expression, all choices
_DEEPEST = 64  # objects and lists within each other


def a_schema(name: str, value: Any) -> Mapping[str, Any]:
    """A JSON schema, given as a mapping or as its text."""
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(
                "option_invalid", f"{name} must be a JSON schema, and its text is no JSON: {error}"
            ) from error
    if not isinstance(schema, Mapping):
        raise InputError("option_invalid", f"{name} must be a JSON schema, which is an object; got {shown(value)}")
    check_size(name, schema)
    return schema


def check_size(name: str, schema: Any) -> None:
    """InputError unless a schema is JSON of at most 64 KB and 64 levels."""
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError("option_invalid", f"{name} must be made of JSON's types: {error}") from error
    if size > MOST_BYTES or _depth(schema) > _DEEPEST:
        raise InputError(
            "option_invalid",
            f"{name} must have at most {MOST_BYTES:,} bytes of JSON and {_DEEPEST} levels; it has {size:,} bytes and "
            f"{_depth(schema)} levels",
        )


def _depth(value: Any) -> int:
    """How many objects and lists are within each other; the value has no circles."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, Mapping | list | tuple)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, Mapping) else item)]
    return depth


def read_schema(typed: str, text: str) -> str:
    """JSON on the command line: its text, which begins with { or [, or a file."""
    if text.lstrip().startswith(("{", "[")):
        return text
    try:
        if not text.strip():
            raise ValueError("it is empty")
        with Path(text).expanduser().open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        return data.decode("utf-8-sig")
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            "text_unreadable", f"{typed} must be JSON, beginning with {{ or [, or a file that holds it: {error}"
        ) from error


def read_tool_list(typed: str, text: str) -> Any:
    """Tools on the command line, as JSON or a file: a list, or an object with the list as `tools`."""
    try:
        found = json.loads(read_schema(typed, text))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("text_unreadable", f"{typed} must be a list of tools in JSON: {error}") from error
    return found["tools"] if isinstance(found, dict) and set(found) == {"tools"} else found


def a_regex(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value or len(value.encode(errors="replace")) > MOST_BYTES or _lone(value):
        raise InputError(
            "option_invalid", f"{name} must be a regular expression of 1 to {MOST_BYTES:,} bytes, got {shown(value)}"
        )
    return value


def choices(name: str, value: Any) -> tuple[str, ...]:
    valid = isinstance(value, list | tuple) and all(
        isinstance(text, str) and text and not _lone(text) for text in value
    )
    if not valid or not value or sum(len(text.encode(errors="replace")) for text in value) > MOST_BYTES:
        raise InputError(
            "option_invalid",
            f"{name} must be a list of texts that are not empty, of {MOST_BYTES:,} bytes in all; got {shown(value)}",
        )
    return tuple(value)


def _lone(text: str) -> bool:
    """Whether a text has a half of a character, which no answer can have."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def a_response_format(name: str, value: Any) -> Mapping[str, Any]:
    """As OpenAI's API has it."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise InputError(
            "option_invalid",
            f"{name} must be a mapping whose type is text, json_object or json_schema, got {shown(value)}",
        )
    if kind == "json_schema":
        given = value.get("json_schema")
        if not isinstance(given, Mapping) or "schema" not in given:
            raise InputError(
                "option_invalid",
                f"{name} of type json_schema must have json_schema, a mapping with name and schema; got {shown(given)}",
            )
        a_schema(f"{name}: schema", given["schema"])
    return value


def a_tool_choice(name: str, value: Any) -> str | Mapping[str, Any]:
    """none, auto, required, a function's name, or OpenAI's mapping with a function's name."""
    if isinstance(value, str) and value:
        return value
    function = value.get("function") if isinstance(value, Mapping) and value.get("type") == "function" else None
    if isinstance(function, Mapping) and isinstance(function.get("name"), str):
        return value
    raise InputError(
        "option_invalid",
        f"{name} must be none, auto, required, a function's name, or "
        f'{{"type": "function", "function": {{"name": ...}}}}; got {shown(value)}',
    )
