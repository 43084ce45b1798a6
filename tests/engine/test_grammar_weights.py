"""Grammars hold a model of random weights: it knows nothing of JSON or calls, so all form is the grammar's."""

import json

import pytest
from engine.grammars import allowed, grammar, read_calls, valid
from engine.test_grammar_calls import ALL, FREE, SCHEMAS

from mlx_qwen35 import generate, load

POINT = {
    "type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 50}, "on": {"type": "boolean"}},
    "required": ["x", "on"], "additionalProperties": False,
}  # fmt: skip
BOUNDED = {  # every answer of these is short
    "enum": {"enum": ["red", "green", "blue", 7, None, True]},
    "const": {"const": {"a": [1, 2, {"b": None}]}},
    "whole": {"type": "integer", "minimum": -20, "maximum": 1000},
    "object": POINT,
    "array": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 5},
    "string": {"type": "string", "maxLength": 12},
    "pattern": {"type": "string", "pattern": "^[a-f0-9]{8}-[a-f0-9]{4}$"},
    "nested": {
        "type": "object", "properties": {"p": POINT, "q": {"type": ["boolean", "null"]}},
        "required": ["p"], "additionalProperties": False,
    },
    "union": {"anyOf": [POINT, {"enum": ["none", "all"]}, {"type": "null"}]},
    "reference": {
        "$defs": {"P": POINT}, "type": "array", "items": {"$ref": "#/$defs/P"}, "minItems": 1, "maxItems": 2,
    },
}  # fmt: skip
OPEN = {
    "text": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "list": {"type": "array", "items": {"type": "string"}},
    "any": {"type": "object"},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "person": {
        "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": False,
    },
    "tree": {
        "$defs": {"T": {"type": "object", "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/T"}},
                        "required": ["v"], "additionalProperties": False}},
        "$ref": "#/$defs/T",
    },
    "matrix": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    "options": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "boolean"}}]},
}  # fmt: skip
MOST, SEEDS = 80, 10


@pytest.fixture(scope="module")
def loaded(source_of):
    return load(source_of("float32"))


def answer(loaded, made, seed: int, **options):
    constraint = made()
    options = {"max_tokens": MOST, "temp": 1.0, "top_k": 0, "top_p": 1.0, "enable_thinking": False} | options
    return generate(*loaded, "Go.", seed=seed, constraint=constraint, **options)


def is_a_beginning(processor, made, tokens) -> bool:
    fresh = made()
    for token in tokens:
        if token not in allowed(fresh, processor):
            return False
        fresh.accept(token)
    return True


def check(loaded, made, seed: int, drafts: bool = True) -> tuple[str, str]:
    """How an answer ended, and its text. It is the same with drafts, and cut it is the beginning of another."""
    plain = answer(loaded, made, seed, mtp="off")
    if drafts:
        drafted = answer(loaded, made, seed, mtp="on", mtp_depth=3)
        assert drafted.tokens == plain.tokens and drafted.mtp.drafted > 0
    assert plain.finish_reason in ("stop", "length")
    assert is_a_beginning(loaded[1], made, plain.tokens)
    return plain.finish_reason, loaded[1].decode([t for t in plain.tokens if t not in loaded[1].stop_ids])


def few(names, ordinary) -> list:
    return [name if name in ordinary else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", few(BOUNDED, ()))
def test_an_answer_with_an_end_comes_to_it_and_is_valid(loaded, name):
    made, ends = grammar(loaded[1], json_schema=BOUNDED[name]), []
    for seed in range(SEEDS):
        reason, text = check(loaded, made, seed)
        ends.append(reason)
        assert reason == "length" or valid(json.loads(text), BOUNDED[name]), text
    assert ends.count("stop") >= 0.9 * len(ends)


@pytest.mark.full
@pytest.mark.parametrize("name", OPEN)
def test_an_answer_that_may_go_on_is_valid_or_cut(loaded, name):
    made = grammar(loaded[1], json_schema=OPEN[name])
    for seed in range(SEEDS):
        reason, text = check(loaded, made, seed)
        assert reason == "length" or valid(json.loads(text), OPEN[name]), text


@pytest.mark.full
@pytest.mark.parametrize("choice", ["required", "get_weather", "f", "g"])
@pytest.mark.parametrize("part", range(10))
def test_calls_that_must_come_are_well_formed_or_cut(loaded, choice, part):
    made = grammar(loaded[1], ALL, tool_choice=choice)
    for seed in range(5 * part, 5 * part + 5):
        reason, text = check(loaded, made, seed, drafts=seed % 5 == 0)
        if reason == "stop":
            calls = read_calls(text)
            assert calls and all(set(SCHEMAS[called]["required"]) <= set(values) for called, values in calls)


def test_a_free_string_is_closed_by_a_model_that_wants_to(loaded):
    """Its tokens are biased to the closing line: each value ends, and stands in the answer as it was written."""
    processor = loaded[1]
    bias = dict.fromkeys(processor.tokenizer.encode("\n</parameter>\n"), 6.0)
    made, ended = grammar(processor, [FREE], tool_choice="g"), 0
    for seed in range(2):
        result = answer(loaded, made, seed, logit_bias=bias, max_tokens=120)
        assert is_a_beginning(processor, made, result.tokens)
        if result.finish_reason == "stop":
            ended += 1
            assert read_calls(processor.decode([t for t in result.tokens if t not in processor.stop_ids]))
    assert ended
