"""Fields of OpenAI's chat completions -> options of generate, name by name."""

from typing import Any

import pytest
from serving import Running

from mlx_qwen35.server import asked
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import Fields

SCHEMA = {"type": "object"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "look"}}
TOOLS = {"tools": [TOOL], "parallel_tool_calls": True}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        (dict.fromkeys(("temperature", "top_k", "seed", "logit_bias")), {}),  # null is left out
        ({"temperature": 0}, {"temp": 0.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"logit_bias": {"7": -100}}, {"logit_bias": {7: -100.0}}),
        *[({name: 0.5}, {name: 0.5}) for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty")],
        ({"min_p": 0.5, "min_tokens_to_keep": 3}, {"min_p": 0.5, "min_tokens_to_keep": 3}),
        ({"xtc_probability": 0.5, "xtc_threshold": 0.2}, {"xtc_probability": 0.5, "xtc_threshold": 0.2}),
        ({"xtc_probability": 0, "xtc_threshold": 0.1, "min_p": 0, "min_tokens_to_keep": 1},  # all the defaults
         {"xtc_probability": 0.0, "min_p": 0.0}),
        ({"repetition_penalty": 1.5, "seed": 2**32 - 1}, {"repetition_penalty": 1.5, "seed": 2**32 - 1}),
    ],
)
def test_sampling(nano_server: Running, fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert asked.sampling(Fields(fields), nano_server.service) == options


OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        *[(switch, switch) for switch in (OFF, ON)],
        *[({"chat_template_kwargs": switch}, switch) for switch in (OFF, ON, {})],
        *[({"reasoning_effort": name}, {"reasoning_effort": name}) for name in ("minimal", "low", "medium", "high")],
        ({"reasoning_effort": "none"}, OFF),
        *[({"reasoning_effort": name}, {"reasoning_effort": "high"}) for name in ("xhigh", "max")],
        *[({name: 30, "reasoning_effort": "low"} | ON, {"thinking_budget": 30}) for name in asked.BUDGETS],
        ({"thinking": {"type": "enabled", "budget_tokens": 30}}, {"thinking_budget": 30}),
        ({"thinking": {"type": "enabled"}}, ON),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "none"}, OFF),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking_budget": 0}, {"thinking_budget": 0}),
    ],
)
def test_thinking(fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert asked.thinking(Fields(fields)) == options


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (OFF | {"reasoning_effort": "low"}, "reasoning_effort"),
        (ON | {"chat_template_kwargs": OFF}, "chat_template_kwargs.enable_thinking"),
        ({"reasoning_effort": "none", "thinking_token_budget": 5}, "thinking_token_budget"),
        ({"thinking_budget": 4, "thinking_token_budget": 5}, "thinking_token_budget"),
    ],
)
def test_fields_of_thinking_that_contradict_each_other(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        asked.thinking(Fields(fields))
    assert (refused.value.code, refused.value.param) == ("option_conflict", param)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
        ({"response_format": FORMAT}, {"response_format": FORMAT}),
        *[({name: SCHEMA}, {"json_schema": SCHEMA}) for name in ("json_schema", "guided_json")],
        *[({name: "a+"}, {"regex": "a+"}) for name in ("regex", "guided_regex")],
        *[({name: ["a", "b"]}, {"choice": ("a", "b")}) for name in ("choice", "guided_choice")],
        ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a"]}}, {"choice": ("a",)}),
    ],
)
def test_forms(fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert asked.form(Fields(fields)) == options


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
        ({"tools": [TOOL]}, TOOLS | {"tool_choice": "auto"}),
        *[({"tools": [TOOL], "tool_choice": word}, TOOLS | {"tool_choice": word}) for word in ("none", "required")],
        ({"tools": [TOOL], "tool_choice": TOOL}, TOOLS | {"tool_choice": "look"}),
        (
            {"tools": [TOOL], "parallel_tool_calls": False},
            {"tools": [TOOL], "parallel_tool_calls": False, "tool_choice": "auto"},
        ),
    ],
)
def test_tools(fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert asked.tools(Fields(fields)) == options


@pytest.mark.parametrize("texts", ["a", ["a", "b"], None, []])
def test_stops(texts: Any) -> None:
    right = [texts] if isinstance(texts, str) else texts
    assert asked.stops(Fields({"stop": texts})) == ({"stop": right} if right else {})


def test_fields_that_ask_for_nothing_are_taken() -> None:
    idle = {"modalities": ["text"], "best_of": 1, "function_call": "none", "verbosity": "medium", "echo": False}
    asked.settle(Fields(idle | {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "flex"}))
