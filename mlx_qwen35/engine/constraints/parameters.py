"""The parameters of a tool: what text each may have as its value in a call, by its JSON schema.

A string is raw text, an object or an array is JSON. A type in several forms may come in any that is read back as meant:
True and true, None and null.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.engine.constraints.guidance import json_rule, regex_rule, without_anchors
from mlx_qwen35.engine.constraints.raw import TAGS
from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

Schema = Mapping[str, Any]

_JSON_TYPES = ("object", "array", "integer", "number")
_MOST = 10_000  # schemas of one tool, each as often as it is referred to
_DEEPEST = 64  # references and alternatives within each other
_NOTES = ("type", "title", "description", "default", "examples", "deprecated", "$comment", "$defs", "definitions")
_BOUNDS = ("pattern", "minLength", "maxLength")  # of strings
_NUMBER_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Plain numbers stay within what Python reads back as a number.
_INTEGER, _NUMBER = "-?(0|[1-9][0-9]{0,99})", r"-?(0|[1-9][0-9]{0,99})(\.[0-9]{1,99})?([eE][+-]?[0-9]{1,2})?"
_FORBIDDEN = "|".join(tag.decode().replace("/", r"\/") for tag in TAGS)
_TAGGED = f"(?s:.*)({_FORBIDDEN})(?s:.*)"
CLOSER = "\n</parameter>\n"


@dataclass(frozen=True)
class Value:
    """What texts the value of a parameter may have: any if `free`; else one of `texts`, or of those of `rules`.

    rules: expressions in the Lark of llguidance. whole: a terminal that holds the closing line too.
    """

    free: bool = False
    texts: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def __or__(self, other: "Value") -> "Value":
        if self.free or other.free:
            return FREE
        joined = dict.fromkeys((*self.texts, *other.texts))
        return Value(False, tuple(joined), self.rules + other.rules, self.whole + other.whole)

    @property
    def lark(self) -> str:
        """The rules of a grammar for the value and the line that closes it."""
        plain = [json.dumps(text, ensure_ascii=False) for text in self.texts] + list(self.rules)
        lines = [f"value{i}: {rule}" for i, rule in enumerate(plain)]
        lines += [f"WHOLE{i}: {terminal}" for i, terminal in enumerate(self.whole)]
        options = [f"value{i} {json.dumps(CLOSER)}" for i in range(len(plain))]
        options += [f"WHOLE{i}" for i in range(len(self.whole))]
        return "\n".join([f"start: {' | '.join(options)}", *lines])


FREE = Value(free=True)
_NULL, _BOOLEAN = Value(texts=("null", "None")), Value(texts=("true", "false", "True", "False"))


@dataclass(frozen=True)
class Parameters:
    """The parameters of one tool.

    values: by name, in the order of the schema. required: the names that must come. extra: the value of parameters
    with other names; None where there are none.
    """

    values: Mapping[str, Value]
    required: frozenset[str]
    extra: Value | None


def parameters_of(schema: Any, strict: bool, what: str) -> Parameters:
    """The parameters of a tool by the schema of its arguments. InputError names the tool, as `what`.

    strict: whether a keyword that cannot be held is refused; otherwise it is passed over.
    """
    reader = _Reader(schema if isinstance(schema, Mapping) else {}, strict, what)
    top = reader.followed(reader.root)
    if strict and (unknown := sorted({"allOf", "anyOf", "oneOf", "not", "if", "patternProperties"} & set(top))):
        raise InputError(
            "grammar_invalid", f"{what}: its parameters must be listed under properties; {unknown[0]} is not read there"
        )
    listed, required = top.get("properties", {}), top.get("required", [])
    named = isinstance(required, list | tuple) and all(isinstance(name, str) for name in required)
    if not isinstance(listed, Mapping) or not named:
        raise InputError(
            "grammar_invalid", f"{what}: properties must be an object and required a list of names, as in JSON schemas"
        )
    values = {name: reader.value(listed.get(name, {})) for name in (*listed, *(n for n in required if n not in listed))}
    for name in values:
        check_name(name, f"{what}: a parameter")
    extra = top.get("additionalProperties", False)
    return Parameters(values, frozenset(required), None if extra is False else reader.value(extra))


def check_name(name: Any, what: str) -> None:
    """InputError unless a call can hold a name between = and >, and is read back with it."""
    if not isinstance(name, str) or not name or any(c in "<>\"'" or c.isspace() for c in name):
        raise InputError(
            "grammar_invalid", f"{what} must have a name without blanks, quotes, < and >; got {shown(name)}"
        )


class _Reader:
    """Reads the schemas of one tool."""

    def __init__(self, root: Schema, strict: bool, what: str):
        self.root, self.strict, self.what = root, strict, what
        self._read = 0  # schemas

    def followed(self, schema: Any, depth: int = 0) -> Schema:
        """A schema in place of a reference to it."""
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or depth > _DEEPEST:
            return schema if isinstance(schema, Mapping) else {}
        found: Any = self.root
        for step in reference.removeprefix("#").split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, Mapping) else None
        if not reference.startswith("#") or found is None:
            raise InputError("grammar_invalid", f"{self.what}: $ref must name a part of the schema, got {reference!r}")
        return self.followed(found, depth + 1)

    def value(self, schema: Any, depth: int = 0) -> Value:
        self._read += 1
        if depth > _DEEPEST or self._read > _MOST:
            raise InputError(
                "grammar_invalid", f"{self.what}: its schemas must be at most {_MOST:,}, nested at most {_DEEPEST} deep"
            )
        found = self.followed(schema)
        for key in ("enum", "const"):
            if key in found:
                return self._listed(found[key] if key == "enum" else [found[key]])
        for key in ("anyOf", "oneOf", "allOf"):
            options = found.get(key)
            if isinstance(options, list) and options and (key != "allOf" or len(options) == 1):
                return self._any_of(options, depth)
        return self._typed(found, depth)

    def _any_of(self, options: Sequence[Any], depth: int) -> Value:
        joined = Value()
        for option in options:
            joined |= self.value(option, depth + 1)
        return joined

    def _typed(self, schema: Schema, depth: int) -> Value:
        kind = schema.get("type") or next((k for k, key in _HINTS if key in schema), None)
        if isinstance(kind, list | tuple):
            return self._any_of([{**schema, "type": one} for one in kind], depth)
        if kind == "string":
            return self._string(schema)
        if kind in ("boolean", "null"):
            return _BOOLEAN if kind == "boolean" else _NULL
        if kind in ("integer", "number") and not any(bound in schema for bound in _NUMBER_BOUNDS):
            return Value(rules=(f"/{_INTEGER if kind == 'integer' else _NUMBER}/",))
        if kind in _JSON_TYPES or "allOf" in schema:
            definitions = {key: self.root[key] for key in ("$defs", "definitions") if key in self.root}
            return Value(rules=(json_rule({**definitions, **schema}, lenient=not self.strict),))
        if kind is None:
            self._check_known(schema, ())
            return FREE
        raise InputError("grammar_invalid", f"{self.what}: type must be one of JSON's, got {shown(kind)}")

    def _string(self, schema: Schema) -> Value:
        """A raw string. Its bounds slow a mask down by milliseconds, so they are held where the tool is strict."""
        self._check_known(schema, _BOUNDS)
        if not self.strict or not any(bound in schema for bound in _BOUNDS):
            return FREE
        least, most = self._length(schema, "minLength", 0), self._length(schema, "maxLength", "")
        terms = [f"/(?s:.{{{least},{most}}})/", f"~/{_TAGGED}/"]
        if pattern := schema.get("pattern"):
            if not isinstance(pattern, str):
                raise InputError("grammar_invalid", f"{self.what}: pattern must be a text, got {shown(pattern)}")
            inside = without_anchors(pattern)
            before, after = ("" if pattern.startswith("^") else "(?s:.*)"), ("" if inside[1] else "(?s:.*)")
            terms.append(regex_rule(f"{before}({inside[0]}){after}"))
        return Value(whole=(f"({' & '.join(terms)}) {json.dumps(CLOSER)}",))

    def _length(self, schema: Schema, key: str, absent: Any) -> Any:
        value = schema.get(key, absent)
        if value == absent or (isinstance(value, int | float) and value >= 0 and value == int(value)):
            return value if value == absent else int(value)
        raise InputError("grammar_invalid", f"{self.what}: {key} must be a whole number, got {shown(value)}")

    def _check_known(self, schema: Schema, known: Sequence[str]) -> None:
        """A strict tool's raw text cannot be held to other keywords."""
        unknown = [key for key in schema if key not in (*known, *_NOTES)]
        if self.strict and unknown:
            raise InputError(
                "grammar_invalid",
                f"{self.what}: text of a strict tool cannot be held to {shown(unknown[0])}. Leave it out, or strict",
            )

    def _listed(self, values: Any) -> Value:
        """The values of an enum, as they are read back."""
        if not isinstance(values, list | tuple) or not values:
            raise InputError("grammar_invalid", f"{self.what}: enum must be a list of values, got {shown(values)}")
        texts = [text for value in values for text in _spellings(value)]
        if bad := next((text for text in texts if any(tag.decode() in text for tag in TAGS)), None):
            raise InputError("grammar_invalid", f"{self.what}: enum must not hold the tags of calls, got {shown(bad)}")
        return Value(texts=tuple(dict.fromkeys(texts)))


_HINTS = (("object", "properties"), ("array", "items"), ("string", "pattern"), ("string", "maxLength"))


def _spellings(value: Any) -> tuple[str, ...]:
    if value is None:
        return _NULL.texts
    if isinstance(value, bool):
        return ("true", "True") if value else ("false", "False")
    return (value,) if isinstance(value, str) else (json.dumps(value, ensure_ascii=False),)
