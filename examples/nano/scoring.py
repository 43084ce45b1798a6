"""Scores of answers: by what they call, by the value of their JSON, else by their words."""

import json
from collections.abc import Mapping
from typing import Any

from tasks import Item

from mlx_qwen35 import parse_answer

TYPES = {
    "string": str, "integer": int, "number": int | float, "boolean": bool, "object": dict, "array": list,
}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal values of JSON: numbers by value, and a boolean is no number."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is valid under a schema of the tasks: type, enum, properties, required and items."""
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (kind != "boolean" and isinstance(value, bool)):
        return False
    if value not in schema.get("enum", [value]):
        return False
    if kind == "object":
        known = schema["properties"]
        whole = set(schema.get("required", ())) <= value.keys() <= known.keys()
        return whole and all(fits(value[key], known[key]) for key in value)
    return kind != "array" or all(fits(entry, schema["items"]) for entry in value)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except ValueError:
        return None


def _answer(text: str, item: Item) -> Any:
    return parse_answer(text, item.tools, item.enable_thinking and not item.given)


def right(text: str, item: Item) -> bool:
    """Whether a completion answers its item: the calls in the order asked, the JSON's value, or the very words."""
    found = _answer(text, item)
    if item.schema is not None:
        return same(_json(found.content), json.loads(item.answer))
    if item.calls:
        called = [[call.name, dict(call.arguments)] for call in found.tool_calls]
        return same(called, [[name, dict(arguments)] for name, arguments in item.calls])
    return not found.tool_calls and found.content == item.answer


def well_formed(text: str, item: Item) -> bool | None:
    """Whether the calls fit the tools, or the JSON its schema; None for an item that is about neither."""
    found = _answer(text, item)
    if item.schema is not None:
        return fits(_json(found.content), item.schema)
    if not item.calls:
        return None
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in item.tools or ()}
    return bool(found.tool_calls) and all(
        call.name in schemas and fits(dict(call.arguments), schemas[call.name]) for call in found.tool_calls
    )
