"""Tool calls: what a call is, and how the text of an argument is typed by the schema of its tool."""

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST = 256  # schemas that are looked at for one argument
_BITS = 4_096  # of a whole number in a message
_LITERAL = 100_000  # characters of a Python literal that is parsed
_DIGITS = 1_000  # of a whole number; messages hold numbers of at most 4,096 bits
_LEVELS = 60  # of lists and objects in each other; messages hold 64
_NULLS = ("null", "None")
_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """A whole call.

    id: of this call in its conversation; the message with its result names it (tool_call_id). arguments: values of the
    types that the tool's schema asks for; a value that does not fit is text.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Cut:
    """A call that had begun and is not whole.

    name: None while it is not known. arguments: the whole ones. open: the one under way, its text so far.
    """

    name: str | None
    arguments: Mapping[str, Any]
    open: Mapping[str, str]


class Tools:
    """The functions that an answer may call, by name. A schema may be anything: what cannot be used types nothing."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]):
        self._parameters: dict[str, Schema] = {}
        self._kinds: dict[tuple[str, str], Kind] = {}
        for tool in tools:
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                parameters = function.get("parameters")
                self._parameters[function["name"]] = parameters if isinstance(parameters, Mapping) else {}

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def kind(self, tool: str, parameter: str) -> "Kind":
        """How the text of a parameter is typed; of an unknown one it is text."""
        if (tool, parameter) not in self._kinds:
            self._kinds[tool, parameter] = self._kind(tool, parameter)
        return self._kinds[tool, parameter]

    def _kind(self, tool: str, parameter: str) -> "Kind":
        root = self._parameters.get(tool, {})
        properties, more = root.get("properties"), root.get("additionalProperties")
        known = properties.get(parameter) if isinstance(properties, Mapping) else None
        schema = known if isinstance(known, Mapping) else more if isinstance(more, Mapping) else _TEXT
        return Kind(schema, root)


_TEXT: Schema = {"type": "string"}


class Kind:
    """How the text of one argument is typed."""

    def __init__(self, schema: Schema, root: Schema):
        """root: where $ref looks."""
        self._alternatives = list(_alternatives(schema, root, iter(range(_MOST))))
        names = [alternative.get("type") for alternative in self._alternatives]
        strings = [name == "string" and not _values(a) for name, a in zip(names, self._alternatives, strict=True)]
        self.plain = bool(strings) and all(strings)  # the text is the value, whatever it is
        first = next((i for i, name in enumerate(names) if name != "null"), 0)
        self.json = any(name in ("object", "array") for name in names)
        # The text is the value unless it is a null.
        self.text_or_null = not self.plain and bool(strings) and strings[first]

    def value(self, text: str) -> Any:
        """The value of a text; the text itself where it fits no alternative."""
        if self.plain:
            return text
        if text.strip() in _NULLS and not any(text.strip() in _values(a) for a in self._alternatives):
            return None
        for alternative in self._alternatives:
            found = _typed(text, alternative)
            if found is not _UNFIT:
                return found
        return text

    def may_be_null(self, text: str) -> bool:
        """Whether this text, or what it begins, may be a null."""
        text = text.lstrip()
        bare = text.rstrip()
        return bare in _NULLS or (text == bare and any(null.startswith(bare) for null in _NULLS))


_UNFIT = object()


def _alternatives(schema: Any, root: Schema, left: Iterator[int]) -> Iterator[Schema]:
    """The schemas of single types that a schema allows, in order, looking at as many schemas as `left` has items."""
    if not isinstance(schema, Mapping) or next(left, None) is None:
        return
    if isinstance(schema.get("$ref"), str):
        yield from _alternatives(_referred(schema["$ref"], root), root, left)
        return
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(name), list) and schema[name]:
            for alternative in schema[name]:
                yield from _alternatives(alternative, root, left)
            return
    types = schema.get("type")
    for kind in types if isinstance(types, list) else [types]:
        yield {**schema, "type": kind}


def _referred(path: str, root: Schema) -> Any:
    found: Any = root
    for name in path.removeprefix("#").strip("/").split("/"):
        name = name.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) and name else None if name else found
    return found if path.startswith("#") else None


def _values(schema: Schema) -> list[Any]:
    """The values that a schema lists."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else []


def _typed(text: str, schema: Schema) -> Any:
    """The value of a text by a schema of a single type, or _UNFIT."""
    if values := _values(schema):
        return _listed(text, values)
    bare, kind = text.strip(), schema.get("type")
    if kind == "string":
        return text
    if kind == "boolean":
        return {"true": True, "false": False}.get(bare.lower(), _UNFIT)
    if kind in ("integer", "number"):
        return _number(bare, whole=kind == "integer")
    if kind in ("object", "array"):
        found = _parsed(bare)
        return found if isinstance(found, dict if kind == "object" else list) else _UNFIT
    return _UNFIT if kind == "null" else _anything(text)


def _listed(text: str, values: Sequence[Any]) -> Any:
    """The listed value that a text names. Quotes are taken off where only the bare word is listed."""
    if text in values:
        return text
    bare = text.strip()
    for word in (bare, bare[1:-1] if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'" else bare):
        if word in values:
            return word
    found = _anything(bare)
    for value in values:
        if type(value) is type(found) and value == found:
            return value
        if _is_number(value) and _is_number(found) and value == found:
            return value
    return _UNFIT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(text: str, whole: bool) -> Any:
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= _DIGITS else _UNFIT
    if not _NUMBER.fullmatch(text):
        return _UNFIT
    found = float(text)
    if not math.isfinite(found) or (whole and not found.is_integer()):
        return _UNFIT
    return int(found) if whole else found


def _anything(text: str) -> Any:
    """A JSON value or a Python constant; else the text."""
    bare = text.strip()
    if bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    found = _number(bare, whole=False)
    if found is _UNFIT:
        found = _parsed(bare)
    return text if found is _UNFIT else found


def _parsed(text: str) -> Any:
    """A JSON value, else a Python literal that JSON can hold, else _UNFIT."""
    try:
        return holdable(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        pass
    if len(text) > _LITERAL or not text.startswith(("{", "[", "(")):
        return _UNFIT
    try:
        return holdable(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return _UNFIT


def holdable(value: Any, level: int = 0) -> Any:
    """A value as a history can hold it: of JSON's types, tuples made lists. ValueError for any other.

    Numbers must be finite and of at most 4,096 bits, texts valid Unicode, lists and objects nested at most 60 deep.
    """
    if isinstance(value, dict) and level < _LEVELS:
        if not all(isinstance(name, str) for name in value):
            raise ValueError("a member has no text as its name")
        return {holdable(name): holdable(item, level + 1) for name, item in value.items()}
    if isinstance(value, list | tuple) and level < _LEVELS:
        return [holdable(item, level + 1) for item in value]
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError
    elif isinstance(value, float) and math.isfinite(value):
        return value
    elif not (value is None or (isinstance(value, int) and value.bit_length() <= _BITS)):
        raise ValueError("JSON cannot hold this")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
