"""Tool calls that must come: every one is well formed, and is read back as it was meant."""

import json

import numpy as np
import pytest
from engine.grammars import Walker, accepts, allowed, as_value, grammar, read_calls, taken, valid
from engine.test_grammar import back_and_forth
from refusing import refused

from mlx_qwen35 import load


def tool(name: str, properties: dict | None = None, required: tuple = (), **schema) -> dict:
    strict = {"strict": schema.pop("strict")} if "strict" in schema else {}
    parameters = {"type": "object", "properties": properties or {}, "required": list(required), **schema}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **strict}}


POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x"],
         "additionalProperties": False}  # fmt: skip
WEATHER = tool(
    "get_weather",
    {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["metric", "imperial"]}},
    required=("city",),
)
TYPES = tool(
    "f",
    {
        "i": {"type": "integer"}, "n": {"type": "number"}, "b": {"type": "boolean"}, "z": {"type": "null"},
        "o": {"type": "object"}, "a": {"type": "array", "items": {"type": "integer"}}, "e": {"enum": ["on", "off", 3]},
        "c": {"const": "fixed"}, "ni": {"type": ["integer", "null"]}, "r": {"$ref": "#/$defs/Point"},
        "k": {"type": "integer", "minimum": 3, "maximum": 7}, "u": {"anyOf": [{"type": "boolean"}, POINT]},
        "ne": {"anyOf": [{"enum": ["x", "y"]}, {"type": "null"}]}, "al": {"allOf": [{"$ref": "#/$defs/Point"}]},
    },
    **{"$defs": {"Point": POINT}},
)  # fmt: skip
FREE = tool(
    "g",
    {
        "s": {"type": "string"}, "ns": {"type": ["string", "null"]}, "any": {},
        "us": {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "len": {"type": "string", "maxLength": 3},
    },
)  # fmt: skip
PING, OPEN = tool("ping"), tool("open", {"known": {"type": "integer"}}, additionalProperties=True)
ALL = [WEATHER, TYPES, FREE, PING, OPEN]
SCHEMAS = {one["function"]["name"]: one["function"]["parameters"] for one in ALL}


@pytest.fixture(scope="module")
def processor():
    return load("nano")[1]


@pytest.fixture(scope="module")
def walker(processor):
    return Walker(processor)


def call(name: str, **values: str) -> str:
    lines = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


# --- the form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (call("ping"), True),
        (call("get_weather", city="Oslo"), True),
        (call("get_weather", city="Oslo", days="3", units="metric"), True),
        (call("get_weather", city="Oslo", units="metric"), True),
        (call("get_weather", days="3"), False),  # without a required one
        (call("get_weather", days="3", city="Oslo"), False),  # not the schema's order
        (call("get_weather", city="Oslo", days="three"), False),
        (call("get_weather", city="Oslo", units="kelvin"), False),
        (call("get_weather", city="Oslo", wind="3"), False),
        (call("ping", city="Oslo"), False),
        (call("pong"), False),
        (call("ping") + "\n" + call("ping"), True),
        (call("ping") + call("ping"), False),
        (call("ping") + "\n", False),
        ("Well. " + call("ping"), False),
        ("", False),
    ],
)
def test_a_required_answer_is_made_of_calls(processor, text, fits):
    assert accepts(grammar(processor, ALL, tool_choice="required")(), processor, text) is fits


@pytest.mark.parametrize("choice", ["ping", {"type": "function", "function": {"name": "ping"}}])
def test_a_named_function_is_called_once(processor, choice):
    made = grammar(processor, ALL, tool_choice=choice)
    assert accepts(made(), processor, call("ping"))
    assert not accepts(made(), processor, call("get_weather", city="Oslo"))
    assert not accepts(made(), processor, call("ping") + "\n" + call("ping"))


def test_without_parallel_calls_an_answer_ends_behind_one(processor):
    made = grammar(processor, ALL, tool_choice="required", parallel_tool_calls=False)
    assert accepts(made(), processor, call("ping"))
    assert not accepts(made(), processor, call("ping") + "\n" + call("ping"))


def test_a_strict_tool_is_held_to_its_schema_where_a_call_begins(processor):
    """With auto the text is free before the call, behind it comes another one or the end."""
    strict = [tool("sum", {"a": {"type": "integer"}}, required=("a",), strict=True, additionalProperties=False), PING]
    made = grammar(processor, strict)
    assert made().mask() is None
    for text in ("Hello.", "Let me see.\n\n" + call("sum", a="5"), call("ping") + "\n" + call("sum", a="1")):
        assert accepts(made(), processor, text), text
    for text in (call("sum", a="five"), call("sum"), call("other"), call("ping") + " So."):
        assert not accepts(made(), processor, text), text
    assert grammar(processor, strict, tool_choice="none") is None


def test_with_a_form_and_tools_an_answer_is_either(processor):
    made = grammar(processor, ALL, json_schema=POINT)
    for text in ('{"x": 5}', call("ping"), call("ping") + "\n" + call("get_weather", city="Oslo")):
        assert accepts(made(), processor, text), text
    for text in ('{"y": 5}', "Hello.", '{"x": 5}' + call("ping"), call("ping") + '{"x": 5}'):
        assert not accepts(made(), processor, text), text
    alone = grammar(processor, ALL, json_schema=POINT, tool_choice="none")
    assert accepts(alone(), processor, '{"x": 5}') and not accepts(alone(), processor, call("ping"))


# --- values -----------------------------------------------------------------------------------------------------------

GOOD = {
    "i": ["5", "-12", "0"], "n": ["1.5", "-2e3", "7"], "b": ["true", "False"], "z": ["null", "None"],
    "o": ["{}", '{"a": [1, {"b": null}]}'], "a": ["[]", "[1, 2]"], "e": ["on", "3"], "c": ["fixed"],
    "ni": ["5", "null", "None"], "r": ['{"x": 1.5}'], "k": ["3", "7"], "u": ["true", '{"x": 1, "y": 2}'],
    "ne": ["x", "null"], "al": ['{"x": 1}'],
}  # fmt: skip
BAD = {
    "i": ["5.5", "05", "five", ""], "n": ["1.", ".5", "NaN"], "b": ["yes", "TRUE"], "z": ["0"],
    "o": ["[1]", "{'a': 1}"],
    "a": ['["x"]', "[1,2]"], "e": ["On", '"on"', "4"], "c": ["other"], "ni": ["x"], "r": ['{"y": 1}'], "k": ["2", "10"],
    "u": ["5", "{}"], "ne": ["z"], "al": ["{}"],
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_value_that_is_no_string_is_held_to_its_schema(processor, name):
    made = grammar(processor, [TYPES], tool_choice="f")
    fits = [text for text in GOOD[name] + BAD[name] if accepts(made(), processor, call("f", **{name: text}))]
    assert fits == GOOD[name]
    schema, root = SCHEMAS["f"]["properties"][name], SCHEMAS["f"]
    assert all(valid(as_value(text) if text != "on" else text, schema, root) for text in fits)


@pytest.mark.parametrize("name", ["s", "ns", "any", "us"])
def test_a_value_that_may_be_a_string_is_raw_text(processor, name):
    """null and 5 are text then, too, and the parser gives them the type that the schema has for them."""
    made = grammar(processor, [FREE], tool_choice="g")
    for text in ("Oslo", "null", "5", '"hi"', "", "a\n\nb", "<b>é</b> 日本", '{"a": 1}', "x</parameter> y"):
        assert accepts(made(), processor, call("g", **{name: text})), text


@pytest.mark.parametrize("strict", [True, False])
def test_the_bounds_of_a_string_are_held_where_the_tool_is_strict(processor, strict):
    parts = {"a": {"type": "string", "maxLength": 3}, "b": {"type": "string", "pattern": "^[a-z]+$"}}
    parts |= {"c": {"type": "string", "pattern": "b+"}}
    made = grammar(processor, [tool("h", parts, strict=strict)], tool_choice="h")
    for good in (call("h", a="abc"), call("h", b="abc"), call("h", c="abbc")):
        assert accepts(made(), processor, good)
    for bad in (call("h", a="abcd"), call("h", b="a1"), call("h", c="ac")):
        assert accepts(made(), processor, bad) is not strict


def test_parameters_of_other_names_come_behind_the_known_ones(processor):
    made = grammar(processor, [OPEN], tool_choice="open")
    for text in (call("open"), call("open", known="5", other="x\ny", more="5"), call("open", other="5")):
        assert accepts(made(), processor, text), text
    for text in (call("open", other="5", known="5"), call("open", known="x"), call("open", **{"o t": "5"})):
        assert not accepts(made(), processor, text), text


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "fact"),
    [
        (tool("t", {"p": {"type": "thing"}}), "thing"), (tool("t", {"a b": {}}), "a b"), (tool("t>", {}), "t>"),
        (tool("t", {"p": {"enum": []}}), "enum"), (tool("t", {"p": {"enum": ["</parameter>"]}}), "</parameter>"),
        (tool("t", {"p": {"$ref": "#/$defs/Nothing"}}), "Nothing"), (tool("t", [1]), "properties"),
        (tool("t", {"p": {"type": "array", "uniqueItems": True}}, strict=True), "uniqueItems"),
        (tool("t", {}, anyOf=[{"required": ["x"]}], strict=True), "anyOf"),
        (tool("t", {"p": {"type": "string", "pattern": "("}}, strict=True), "parameter p"),
    ],
)  # fmt: skip
def test_a_tool_that_cannot_be_held_is_refused_by_name(processor, bad, fact):
    with refused("grammar_invalid", fact):
        grammar(processor, [bad], tool_choice="required")


def test_a_keyword_that_is_not_known_is_passed_over_where_the_tool_is_not_strict(processor):
    loose = tool("t", {"p": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}})
    made = grammar(processor, [loose], tool_choice="required")
    assert accepts(made(), processor, call("t", p="[1, 1]")) and not accepts(made(), processor, call("t", p='["x"]'))


def test_schemas_within_each_other_without_end_are_refused_or_free(processor):
    endless = tool("t", {"p": {"$ref": "#/$defs/A"}}, **{"$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}]}}})
    with refused("grammar_invalid", "tool t"):
        grammar(processor, [endless], tool_choice="required")
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Tree"}}, "additionalProperties": False}
    made = grammar(
        processor, [tool("t", {"p": {"$ref": "#/$defs/Tree"}}, **{"$defs": {"Tree": tree}})], tool_choice="t"
    )
    assert accepts(made(), processor, call("t", p='{"next": {"next": {}}}'))


@pytest.mark.parametrize("tools", [[5], [{"type": "function"}], [{"function": {"name": 5}}]])
def test_tools_that_are_no_functions_are_refused(processor, tools):
    with refused("option_invalid", "tools"):
        grammar(processor, tools, tool_choice="required")


# --- borders ----------------------------------------------------------------------------------------------------------


def test_a_token_does_not_reach_over_the_end_of_a_value(processor):
    """Behind the closer of a raw value, or the text of another one, stands the structure alone."""
    constraint = grammar(processor, [WEATHER], tool_choice="required")()
    text = call("get_weather", city="Oslo", days="3")
    tokens = processor.tokenizer.encode(text)
    for token in tokens:
        mask = allowed(constraint, processor)
        assert token in mask
        constraint.accept(token)
    assert set(allowed(constraint, processor)) >= processor.stop_ids


def test_the_tokenizer_s_own_spelling_of_a_call_may_come(processor):
    """So what the model has seen in training is what it may write."""
    for value in ("x.", "x)", 'x"', "x>", "x\t", " x "):
        text = call("g", s=value, us=value)
        assert taken(grammar(processor, [FREE], tool_choice="g")(), processor, text) > len(
            processor.tokenizer.encode(text)
        )


def test_names_that_begin_alike_stay_apart(processor):
    tools = [tool("get", {"a": {"type": "integer"}, "ab": {"type": "boolean"}}), tool("get_all")]
    made = grammar(processor, tools, tool_choice="required")
    for text in (call("get", a="5", ab="true"), call("get", ab="true"), call("get_all"), call("get")):
        assert accepts(made(), processor, text), text


# --- going back, and random calls -------------------------------------------------------------------------------------

PLAIN = {"tool_choice": "required"}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 20))])
@pytest.mark.parametrize(("tools", "options"), [(ALL, PLAIN), ([TYPES], PLAIN), (ALL, {"json_schema": POINT})])
def test_what_was_taken_back_leaves_no_trace_over_any_border(processor, walker, tools, options, seed):
    back_and_forth(grammar(processor, tools, **options), walker, seed, steps=80)


def check_random(processor, tokens: list[int], ended: bool, made) -> None:
    """A walk that ended is read back as valid calls; another one is the beginning of some."""
    fresh = made()
    for token in tokens:
        assert token in allowed(fresh, processor)
        fresh.accept(token)
    if not ended:
        return
    calls = read_calls(processor.decode(tokens))
    assert calls
    for name, values in calls:
        schema = SCHEMAS[name]
        assert set(schema["required"]) <= set(values)
        for key, text in values.items():
            part = schema["properties"].get(key, {})
            raw = name == "g" or part in ({"type": "string"}, {}) or "enum" in part or "const" in part
            value = text if raw and text != "3" else as_value(text)
            assert name == "g" or valid(value, part, schema), (name, key, text)


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(s, marks=pytest.mark.full) for s in range(12, 200))])
@pytest.mark.parametrize("choice", ["required", "f"])
def test_random_calls_are_well_formed_or_cut(processor, walker, choice, seed):
    made = grammar(processor, ALL, tool_choice=choice)
    check_random(processor, *walker.walk(made(), seed, most=400), made)


def test_most_random_calls_of_values_with_an_end_come_to_it(processor, walker):
    bounded = [tool("b", {"e": {"enum": ["a", "b"]}, "k": {"type": "integer", "minimum": 0, "maximum": 99}}), PING]
    ends = [walker.walk(grammar(processor, bounded, tool_choice="required")(), seed, most=400)[1] for seed in range(20)]
    assert np.mean(ends) > 0.9


def test_a_tool_keeps_its_schema_as_text(processor):
    """json_schema and tools may be given by the same mapping; neither is changed."""
    before = json.dumps(ALL)
    grammar(processor, ALL, tool_choice="required")()
    assert json.dumps(ALL) == before
