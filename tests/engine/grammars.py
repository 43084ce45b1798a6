"""What the tests of grammars share: random walks without a model, a validator of schemas, a reader of calls.

The validator and the reader are written by themselves, from the rules and not from the code.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_qwen35.engine.constraints.constraint import Constraint
from mlx_qwen35.engine.constraints.grammar import compile_grammar
from mlx_qwen35.engine.options import check_options
from mlx_qwen35.prompt.processor import Processor


def grammar(processor: Processor, tools: Any = None, **options: Any) -> Any:
    return compile_grammar(processor, check_options(options), tools)


def allowed(constraint: Constraint, processor: Processor) -> list[int]:
    """The numbers of the tokens that may come."""
    mask = constraint.mask()
    if mask is None:
        return list(range(processor.vocabulary))
    assert mask.dtype == np.uint32 and mask.shape == (-(-processor.vocabulary // 32),)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


class Walker:
    """Draws tokens at random from what a constraint allows, half of them of the characters `likes` if any may come."""

    def __init__(self, processor: Processor, likes: str = '\n"{}[],:</>0'):
        self.processor = processor
        known = processor.tokenizer.get_vocab()
        ends = processor.stop_ids | {known[tag] for tag in ("<tool_call>", "</tool_call>")}
        self._likes = ends | {token for text, token in known.items() if set(text.replace("Ċ", "\n")) <= set(likes)}

    def step(self, constraint: Constraint, rng: np.random.Generator) -> int:
        tokens = allowed(constraint, self.processor)
        liked = [token for token in tokens if token in self._likes]
        token = int(rng.choice(liked if liked and rng.random() < 0.5 else tokens))
        constraint.accept(token)
        return token

    def walk(self, constraint: Constraint, seed: int, most: int = 300) -> tuple[list[int], bool]:
        """The tokens, without the one that ends them, and whether they ended."""
        rng, tokens = np.random.default_rng(seed), []
        for _ in range(most):
            token = self.step(constraint, rng)
            if token in self.processor.stop_ids:
                return tokens, True
            tokens.append(token)
        return tokens, False


def taken(constraint: Constraint, processor: Processor, text: str) -> int:
    """How many tokens of a text a constraint lets come; <tool_call> is a token in it. The text counts as one more."""
    for place, token in enumerate(tokens := processor.tokenizer.encode(text)):
        if token not in allowed(constraint, processor):
            return place
        constraint.accept(token)
    return len(tokens) + (processor.stop_ids <= set(allowed(constraint, processor)))


def accepts(constraint: Constraint, processor: Processor, text: str) -> bool:
    """Whether a constraint lets this text come, and then an end."""
    return taken(constraint, processor, text) > len(processor.tokenizer.encode(text))


# --- JSON schemas -----------------------------------------------------------------------------------------------------

_TYPES = {
    "string": str, "boolean": bool, "null": type(None), "array": list, "object": dict, "number": (int, float),
    "integer": int,
}  # fmt: skip


def valid(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a JSON schema allows a value; for the keywords that the tests use."""
    root = schema if root is None else root
    if "$ref" in schema:
        for step in schema["$ref"].split("/")[1:]:
            root = root[step]
        return valid(value, root, schema)
    if "anyOf" in schema:
        return any(valid(value, option, root) for option in schema["anyOf"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    if "const" in schema:
        return value == schema["const"]
    kinds = schema.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(isinstance(value, _TYPES[k]) and (not isinstance(value, bool) or k == "boolean") for k in kinds):
        return False
    return all(rule(value, schema, root) for kind, rule in _RULES if isinstance(value, kind))


def _string(value: str, schema: Any, root: Any) -> bool:
    return (
        schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1 << 30)
        and re.search(schema.get("pattern", ""), value) is not None
    )


def _number(value: float, schema: Any, root: Any) -> bool:
    return schema.get("minimum", -np.inf) <= value <= schema.get("maximum", np.inf)


def _array(value: list[Any], schema: Any, root: Any) -> bool:
    counted = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 30)
    return counted and all(valid(item, schema.get("items", {}), root) for item in value)


def _object(value: Mapping[str, Any], schema: Any, root: Any) -> bool:
    known, more = schema.get("properties", {}), schema.get("additionalProperties", {})
    if not set(schema.get("required", [])) <= set(value):
        return False
    others = {name: item for name, item in value.items() if name not in known}
    if others and more is False:
        return False
    named = all(valid(value[name], known[name], root) for name in known if name in value)
    return named and all(valid(item, {} if more is True else more, root) for item in others.values())


_RULES: Any = ((str, _string), (bool, lambda *_: True), ((int, float), _number), (list, _array), (dict, _object))


# --- calls ------------------------------------------------------------------------------------------------------------

_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n")


def read_calls(text: str) -> list[tuple[str, dict[str, str]]]:
    """The calls of a text that holds nothing else: name, and values as they are written. Assertion for another text.

    A value ends at a closing tag that closes no tag of its own and has a parameter or the end of the call behind it.
    """
    calls, place = [], 0
    while place < len(text):
        head = re.compile(r"<tool_call>\n<function=([^>\n]+)>\n").match(text, place)
        assert head, text[place : place + 80]
        values, place = {}, head.end()
        while parameter := _PARAMETER.match(text, place):
            values[parameter[1]], place = _value(text, parameter.end())
        tail = re.compile(r"</function>\n</tool_call>(\n(?=<tool_call>)|\Z)").match(text, place)
        assert tail, text[place : place + 80]
        calls.append((head[1], values))
        place = tail.end()
    return calls


def _value(text: str, place: int) -> tuple[str, int]:
    """A value that begins here, and where the line that closes it ends."""
    depth = 0
    for tag in re.compile("<parameter=|<function=|</parameter>|</function>").finditer(text, place):
        behind = re.compile(r"\s*(<parameter=|</function>\s*(</tool_call>|<function=|\Z))").match(text, tag.end())
        if tag[0][1] != "/":
            depth += 1
        elif depth:
            depth -= 1
        elif tag[0] == "</parameter>" and behind:
            value = text[place : tag.start()]
            return value.removesuffix("\n"), tag.end() + 1
    raise AssertionError(f"a value without an end: {text[place : place + 80]}")


def as_value(text: str) -> Any:
    """A value that is no raw string."""
    return {"True": True, "False": False, "None": None}.get(text) if text in ("True", "False", "None") else _json(text)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
