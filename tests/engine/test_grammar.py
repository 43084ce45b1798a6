"""Options that ask for a form of the answer: what may come then, what is refused, and what is not imported."""

import json
import subprocess
import sys

import numpy as np
import pytest
from engine.grammars import Walker, accepts, allowed, grammar, taken, valid
from refusing import refused
from tokenizers import Tokenizer, models

from mlx_qwen35 import load
from mlx_qwen35.engine.constraints.compiler import compiler_of
from mlx_qwen35.engine.constraints.vocabulary import Vocabulary
from mlx_qwen35.engine.options import check_options

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "pet": {"enum": ["cat", "dog", None]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def processor():
    return load("nano")[1]


@pytest.fixture(scope="module")
def walker(processor):
    return Walker(processor)


# --- no grammar -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "tools"),
    [
        ({}, None), ({}, [TOOL]), ({"tool_choice": "auto"}, [TOOL]), ({"tool_choice": "none"}, [TOOL]),
        ({"response_format": {"type": "text"}}, None), ({"tool_choice": "none"}, None),
    ],
)  # fmt: skip
def test_options_that_ask_for_no_form_make_no_grammar(processor, options, tools):
    assert grammar(processor, tools, **options) is None


QUIET = """
import sys
from mlx_qwen35 import generate, load
from mlx_qwen35.engine.constraints.grammar import compile_grammar
model, processor = load("nano")
assert compile_grammar(processor, {"tool_choice": "auto"}, [%s]) is None
generate(model, processor, "hi", max_tokens=2)
assert compile_grammar(processor, {"choice": ("a", "b")}) is not None
print("llguidance" in sys.modules)
"""


def test_llguidance_is_imported_only_for_what_needs_it():
    done = subprocess.run([sys.executable, "-c", QUIET % TOOL], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("options", [{"json_schema": PERSON}, {"regex": "a+"}])
def test_without_llguidance_the_error_says_how_to_install_it(processor, monkeypatch, options):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with refused("package_missing", "pip install 'mlx-qwen35[grammar]'"):
        grammar(processor, **{**options, "regex": "b{7}"} if "regex" in options else options)


CLOSED = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d"}}, "$defs": {"d": {"properties": {"b": {}}}}}


@pytest.mark.parametrize(
    ("schema", "open_at_the_top", "open_inside"),
    [
        (CLOSED, False, False), ({**CLOSED, "additionalProperties": True}, True, False),
        ({**CLOSED, "allOf": [{}]}, True, False), ({**CLOSED, "allOf": [{}, {}]}, True, True), ({**CLOSED, "anyOf": [{"required": ["a"]}, {}]}, True, False),
    ],
)  # fmt: skip
def test_an_object_has_the_keys_that_its_schema_lists_unless_it_says_so(
    processor, schema, open_at_the_top, open_inside
):
    make = grammar(processor, json_schema=schema)
    assert accepts(make(), processor, '{"a": {"b": 1}}')
    assert accepts(make(), processor, '{"a": {"b": 1}, "z": 1}') == open_at_the_top
    assert accepts(make(), processor, '{"a": {"b": 1, "z": 1}}') == open_inside


# --- what may come ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"name": "Ada", "age": 36}', True),
        ('{"name": "Ada \\"x\\" \\n é 日本", "age": -3, "pet": "cat"}', True),
        ('{"name": "Ada", "age": 36, "pet": null}', True),
        ('{"name":"Ada","age":36}', False),  # the blanks of json.dumps
        ('{"age": 36, "name": "Ada"}', False),  # the schema's order
        ('{"name": "Ada"}', False),
        ('{"name": "Ada", "age": 36.5}', False),
        ('{"name": "Ada", "age": 36, "x": 1}', False),
        ('{"name": "Ada", "age": 36}\n', False),
        (' {"name": "Ada", "age": 36}', False),
    ],
)
@pytest.mark.parametrize("form", ["mapping", "text", "response_format"])
def test_an_answer_is_the_json_of_the_schema(processor, form, text, fits):
    wrapped = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    options = {"mapping": {"json_schema": PERSON}, "text": {"json_schema": json.dumps(PERSON)}}
    options["response_format"] = {"response_format": wrapped}
    assert accepts(grammar(processor, **options[form])(), processor, text) is fits


def test_any_object_is_a_json_object(processor):
    made = grammar(processor, response_format={"type": "json_object"})
    assert accepts(made(), processor, '{"a": [1, {"b": null}]}')
    assert not accepts(made(), processor, "[1]")


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"\d{3}-\d{4}", ["555-0123"], ["555-012", "x555-0123", "555-01234"]),
        (r"^(yes|no)$", ["yes", "no"], ["maybe", "yess"]),
        (r"a/b\$", ["a/b$"], ["a/b"]),
        ("a\nb*", ["a\n", "a\nbb"], ["a"]),
        (r"[^\"]+", ["é / ü"], ['"']),
    ],
)
def test_a_regular_expression_is_matched_as_a_whole(processor, pattern, good, bad):
    made = grammar(processor, regex=pattern)
    assert [text for text in good + bad if accepts(made(), processor, text)] == good


def test_a_choice_is_one_of_the_texts(processor):
    texts = ["yes", "yes, but <tool_call>", "no", "日本"]
    made = grammar(processor, choice=texts)
    assert all(accepts(made(), processor, text) for text in ("yes", "no", "日本"))
    assert not any(accepts(made(), processor, text) for text in ("y", "yes,", "no.", "yes, but <tool_call>", "yesno"))


def test_a_control_token_in_a_choice_is_spelled_in_ordinary_tokens(processor, walker):
    ends = [walker.walk(grammar(processor, choice=["<tool_call>", "<|im_end|>x"])(), seed) for seed in range(6)]
    assert all(ended for _, ended in ends)
    assert {processor.decode(tokens) for tokens, _ in ends} == {"<tool_call>", "<|im_end|>x"}
    special = set(processor.tokenizer.backend.get_added_tokens_decoder())
    assert not special & {token for tokens, _ in ends for token in tokens}


def test_where_an_answer_may_end_all_stop_tokens_may_come_and_where_it_must_no_other(processor):
    assert len(processor.stop_ids) == 2
    for options, text, more in (
        ({"regex": "ab?"}, "a", True), ({"regex": "ab?"}, "ab", False), ({"choice": ["a", "ab"]}, "a", True),
        ({"choice": ["a", "ab"]}, "ab", False), ({"json_schema": {"const": 5}}, "5", False),
        ({"json_schema": {"type": "integer"}}, "5", True),
    ):  # fmt: skip
        constraint = grammar(processor, **options)()
        taken(constraint, processor, text)
        may_come = set(allowed(constraint, processor))
        assert processor.stop_ids <= may_come and (may_come > processor.stop_ids) is more, (options, text)
        constraint.accept(min(processor.stop_ids))
        assert set(allowed(constraint, processor)) == processor.stop_ids


def test_before_an_answer_may_end_no_stop_token_may_come(processor):
    constraint = grammar(processor, json_schema=PERSON)()
    for token in processor.tokenizer.encode('{"name": "Ada", "age": 3}'):
        assert processor.stop_ids.isdisjoint(allowed(constraint, processor))
        constraint.accept(token)


def test_a_forbidden_token_is_never_taken(processor):
    for options in ({"json_schema": PERSON}, {"choice": ["a", "b"]}, {"regex": "a"}):
        constraint = grammar(processor, **options)()
        (wrong,) = processor.tokenizer.encode("!")
        with pytest.raises(AssertionError):
            constraint.accept(wrong)
        assert wrong not in allowed(constraint, processor), "it stands where it stood"


def test_answers_do_not_disturb_each_other(processor):
    made = grammar(processor, json_schema=PERSON)
    first, second = made(), made()
    taken(first, processor, '{"name": "Ada", "age": 3')
    taken(second, processor, '{"name": "Ada", "a')
    assert accepts(second, processor, 'ge": 41}') and accepts(first, processor, '6, "pet": null}')


def test_the_bytes_of_a_token_are_what_it_is_decoded_to(processor):
    """And an added token has none, even where the vocabulary lists it too."""
    vocabulary = compiler_of(processor).vocabulary
    for token, data in enumerate(vocabulary.bytes):
        assert not data or data.decode(errors="replace") == processor.decode([token])
    backend = Tokenizer(models.BPE({"a": 0, "<x>": 1, "Ġé": 2}, []))
    backend.add_tokens(["<x>"])
    assert Vocabulary(backend, 3, {7}).bytes == [b"a", b"", b" \xe9"]


def test_what_llguidance_refuses_on_the_way_is_an_error_of_this_answer(processor):
    made = grammar(processor, regex="aa*")
    (wrong,) = processor.tokenizer.encode("!")
    with refused("grammar_failed"):
        made()._states[0].after(wrong)
    assert accepts(made(), processor, "aaa"), "another answer goes on"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "fact"),
    [
        ({"type": "foo"}, "foo"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"properties": []}, "properties"),
        ({"type": "string", "pattern": "("}, "json_schema"),
        ({"type": "string", "format": "of a kind"}, "of a kind"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_by_what_is_wrong(processor, schema, fact):
    with refused("grammar_invalid", "json_schema", fact) as caught:
        grammar(processor, json_schema=schema)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", r"(a)\1", "[z-a]", "a{5,3}"])
def test_an_expression_that_cannot_be_held_is_refused(processor, pattern):
    with refused("grammar_invalid", "regex"):
        grammar(processor, regex=pattern)


def _deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels // 2):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("option", "value", "fact"),
    [
        ("json_schema", "{", "no JSON"), ("json_schema", "[]", "[]"), ("json_schema", 5, "5"),
        ("json_schema", _deep(70), "64 levels"), ("json_schema", {"enum": ["x" * 70_000]}, "65,536"),
        ("json_schema", {"enum": [float("nan")]}, "JSON"), ("json_schema", {"enum": [{1, 2}]}, "JSON"),
        ("json_schema", "[" * 100_000, "json_schema"),
        ("regex", "", "regex"), ("regex", "a" * 70_000, "65,536"), ("choice", [], "choice"), ("choice", [""], "choice"),
        ("choice", "yes", "choice"), ("response_format", {"type": "xml"}, "xml"), ("response_format", "json", "json"),
        ("response_format", {"type": "json_schema"}, "json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "schema"),
        ("tool_choice", "", "tool_choice"), ("tool_choice", {"type": "any"}, "any"), ("tool_choice", 5, "5"),
    ],
)  # fmt: skip
def test_a_value_that_is_none_of_its_kind_is_refused_by_name(option, value, fact):
    with refused("option_invalid", option, fact):
        check_options({option: value})


def test_a_schema_of_the_allowed_depth_is_taken(processor):
    assert grammar(processor, json_schema=_deep(62)) is not None


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"regex": "a", "choice": ["a"]}, ("choice", "regex")),
        ({"json_schema": {}, "response_format": {"type": "json_object"}}, ("json_schema", "response_format")),
        ({"regex": "a", "tool_choice": "required"}, ("regex", "tool_choice='required'")),
        ({"regex": "a", "tool_choice": "ping"}, ("regex", "tool_choice")),
    ],
)
def test_two_forms_of_one_answer_are_refused(processor, options, names):
    with refused("option_conflict", *names):
        grammar(processor, [TOOL], **options)


def test_an_unknown_tool_is_refused_with_the_known_ones(processor):
    named = {"type": "function", "function": {"name": "pong"}}
    for choice in ("pong", named):
        with refused("option_invalid", "tool_choice", "pong", "ping"):
            grammar(processor, [TOOL], tool_choice=choice)


def test_a_choice_of_tools_without_tools_is_refused(processor):
    with refused("option_no_effect", "tool_choice", "tools"):
        grammar(processor, tool_choice="required")


# --- on the command line ----------------------------------------------------------------------------------------------


def test_a_schema_on_the_command_line_is_a_file_or_its_text(tmp_path):
    from mlx_qwen35.commands.generate import parser

    file = tmp_path / "schema.json"
    file.write_text(json.dumps(PERSON), encoding="utf-8-sig")
    for text in (str(file), json.dumps(PERSON), "  " + json.dumps(PERSON)):
        assert parser().parse(["--json-schema", text]).json_schema == PERSON
    with refused("text_unreadable", "--json-schema", "nothing.json"):
        parser().parse(["--json-schema", str(tmp_path / "nothing.json")])
    file.write_text("[1]")
    with refused("option_invalid", "--json-schema", "[1]"):
        parser().parse(["--json-schema", str(file)])


def test_choices_on_the_command_line_add_up():
    from mlx_qwen35.commands.generate import parser

    given = parser().parse(["--choice", "yes", "--choice", "no", "--regex", "a+", "--tool-choice", "required"])
    assert (given.choice, given.regex, given.tool_choice) == (("yes", "no"), "a+", "required")


# --- going back -------------------------------------------------------------------------------------------------------


RULES = {
    "schema": {"json_schema": PERSON},
    "free": {"response_format": {"type": "json_object"}},
    "regex": {"regex": r"([a-z]+,)+[a-z]{1,8}"},
    "choice": {"choice": ["one", "one more", "two", "three"]},
}


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_what_was_taken_back_leaves_no_trace(processor, walker, options):
    made = grammar(processor, **options)
    back_and_forth(made, walker, seed=0, steps=120)


def back_and_forth(made, walker, seed: int, steps: int) -> list[int]:
    """Accept and take back at random; each mask is that of a constraint that went there at once."""
    rng, constraint, tokens = np.random.default_rng(seed), made(), []
    for _ in range(steps):
        if rng.random() < 0.3:
            count = int(rng.integers(0, min(len(tokens), 6) + 1))
            constraint.rollback(count)
            del tokens[len(tokens) - count :]
        elif not tokens or tokens[-1] not in walker.processor.stop_ids:
            tokens.append(walker.step(constraint, rng))
        fresh = made()
        for token in tokens:
            fresh.accept(token)
        assert np.array_equal(fresh.mask(), constraint.mask()), tokens
    return tokens


def test_more_cannot_be_taken_back_than_was_accepted(processor):
    constraint = grammar(processor, regex="a+")()
    with pytest.raises(AssertionError):
        constraint.rollback(1)


# --- random answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_random_answer_is_valid_or_cut(processor, walker, seed):
    tokens, ended = walker.walk(grammar(processor, json_schema=PERSON)(), seed)
    if ended:
        assert valid(json.loads(processor.decode(tokens)), PERSON)
