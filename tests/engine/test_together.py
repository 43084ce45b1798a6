"""Options that restrict an answer, together: thinking, its budget, forms, calls, drafts, batches, images, turns."""

import json

import pytest
from refusing import refused

from mlx_qwen35 import Conversation, batch_generate, generate, load, stream_generate
from mlx_qwen35.engine.generation import start

PICTURE = "examples/pictures/shapes.png"
QUESTION = "What is 34 + 58?"
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
}
WEATHER = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": text,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name, text in (("get_weather", "Get the weather in a city"), ("get_time", "Get the time in a city"))
]
STRICT = [{"type": "function", "function": {**WEATHER[0]["function"], "strict": True}}]
ASKED = "What is the weather in Paris?"


class Anything:
    """A constraint that allows all."""

    def mask(self) -> None:
        return None

    def accept(self, token: int) -> None:
        pass

    def rollback(self, count: int) -> None:
        pass


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def fits(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"sum", "sure"} and 0 <= found["sum"] <= 999 and isinstance(found["sure"], bool)


@pytest.mark.core(1)
@pytest.mark.parametrize("thinking", [{}, {"thinking_budget": 3, "max_tokens": 320}, {"enable_thinking": False}])
@pytest.mark.parametrize("temp", [pytest.param(0, marks=pytest.mark.full), 1.0])
def test_a_form_holds_behind_thinking_and_is_the_same_with_drafts(nano, thinking, temp):
    options = {"json_schema": SCHEMA, "temp": temp, "seed": 4, **thinking}
    plain, drafted = (generate(*nano, QUESTION, mtp=mode, **options) for mode in ("off", "on"))
    assert fits(plain.text) and plain.finish_reason == "stop" and "{" not in plain.reasoning
    assert drafted.tokens == plain.tokens and drafted.text == plain.text


def test_rows_of_a_batch_are_held_each_to_its_own_place(nano):
    prompts, options = [QUESTION, "Who are you?", ASKED], {"json_schema": SCHEMA, "temp": 1.0, "max_tokens": 400}
    together = batch_generate(*nano, prompts, mtp="on", seed=7, **options)
    for row, (prompt, result) in enumerate(zip(prompts, together, strict=True)):
        assert result.tokens == generate(*nano, prompt, mtp="off", seed=7 + row, **options).tokens
        assert result.in_reasoning or fits(result.text)


def test_an_image_goes_with_a_form(nano):
    result = generate(*nano, "What do you see?", images=[PICTURE], choice=["a circle", "a square"], seed=1)
    assert result.text in ("a circle", "a square") and result.finish_reason == "stop"


def test_a_conversation_is_held_to_its_form_in_each_turn(nano):
    conversation = Conversation(*nano, json_schema=SCHEMA, temp=0)
    assert all(fits(conversation.send(question).text) for question in (QUESTION, "Add 10 to that."))


@pytest.mark.parametrize("mtp", [pytest.param("off", marks=pytest.mark.full), "on"])
def test_a_call_comes_parsed_and_in_pieces(nano, mtp):
    options = {"tools": WEATHER, "temp": 0, "mtp": mtp, "seed": 0}
    result = generate(*nano, ASKED, **options)
    assert (result.text, result.finish_reason, result.cut) == ("", "tool_calls", None)
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("get_weather", {"city": "Paris"})]
    pieces = list(stream_generate(*nano, ASKED, **options))
    own = [piece for piece in pieces if not piece.reasoning]
    assert {piece.id for piece in own} == {result.tool_calls[0].id}
    assert json.loads("".join(map(str, own))) == {"city": "Paris"} and own[-1].kind == "tool_call_end"


@pytest.mark.full
def test_ids_follow_from_the_seed(nano):
    first, again, other = (generate(*nano, ASKED, tools=WEATHER, temp=0, seed=seed).tool_calls for seed in (1, 1, 2))
    assert first == again and first[0].id != other[0].id


def test_without_tools_or_with_the_choice_none_a_call_is_text(nano):
    for options in ({}, {"tools": WEATHER, "tool_choice": "none"}):
        result = generate(*nano, ASKED, temp=0, **options)
        assert not result.tool_calls and result.finish_reason == "stop" and result.text


@pytest.mark.parametrize("mtp", [pytest.param("off", marks=pytest.mark.full), "on"])
def test_an_answer_ends_behind_its_first_call_where_one_is_wanted(nano, mtp):
    """The weights would go on: two calls are forced by their form, of which one may follow another."""
    options = {"tools": WEATHER, "tool_choice": "required", "temp": 1.0, "seed": 3, "max_tokens": 300, "mtp": mtp,
               "enable_thinking": False, "logit_bias": dict.fromkeys(nano[1].stop_ids, -100.0)}  # fmt: skip
    several = start(*nano, [ASKED], **options)
    for _ in several:
        if len(several.requests[0].stream.calls) > 1:
            break
    one = generate(*nano, ASKED, parallel_tool_calls=False, **options)
    assert len(several.requests[0].stream.calls) == 2
    assert len(one.tool_calls) == 1 and one.finish_reason == "tool_calls"
    assert one.tokens == tuple(several.requests[0].tokens[: len(one.tokens)])


@pytest.mark.parametrize("count", [25, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 30, 4))])
def test_an_answer_that_is_left_keeps_what_it_has(nano, count):
    generation = start(*nano, [ASKED], tools=WEATHER, temp=0)
    for _ in generation:
        if len(generation.requests[0].tokens) >= count:
            break
    (result,) = generation.results()
    assert result.finish_reason == "interrupted" or (result.finish_reason, len(result.tool_calls)) == ("tool_calls", 1)
    assert not result.text


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("option_conflict", {"json_schema": SCHEMA, "regex": "a"}),
        ("option_conflict", {"choice": ["a"], "tools": WEATHER, "tool_choice": "required"}),
        ("option_no_effect", {"tool_choice": "required"}),
        ("option_no_effect", {"parallel_tool_calls": False}),
        ("option_conflict", {"json_schema": SCHEMA, "constraint": Anything()}),
        ("option_conflict", {"tools": STRICT, "constraint": Anything()}),
        ("option_conflict", {"tools": [{**WEATHER[0], "strict": True}], "constraint": Anything()}),
        ("option_invalid", {"tools": WEATHER, "tool_choice": "get_wether"}),
        ("option_invalid", {"tools": [{"name": "f"}]}),
        ("option_invalid", {"tools": "f"}),
        ("option_invalid", {"json_schema": "{"}),
        ("grammar_invalid", {"json_schema": {"type": "frob"}}),
        ("grammar_invalid", {"regex": "("}),
        ("option_invalid", {"choice": []}),
    ],
)
def test_bad_input_is_refused_before_anything_is_generated(nano, code, options):
    with refused(code):
        start(*nano, [QUESTION], **options)
    if "constraint" not in options:
        with refused(code):
            Conversation(*nano, **options)


def test_an_answer_goes_back_into_a_history(nano):
    asked = [{"role": "user", "content": ASKED}]
    first = generate(*nano, messages=asked, tools=WEATHER, temp=0)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in first.tool_calls]
    second = generate(*nano, messages=[*asked, first.message, *results], tools=WEATHER, temp=0)
    assert "21 degrees" in second.text and not second.tool_calls


@pytest.mark.parametrize("form", [{"regex": "a"}, {"choice": ["a"]}, {"json_schema": SCHEMA}])
def test_a_form_says_the_whole_answer_and_so_goes_on_with_none(nano, form):
    begun = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It is"}]
    with refused("option_conflict", "continue_final_message"):
        generate(*nano, messages=begun, continue_final_message=True, **form)
