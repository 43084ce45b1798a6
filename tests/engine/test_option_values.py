"""Every option with values of wrong types and meanings: refused by its name, or taken as what it means."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35 import InputError, Options, Sampling, VisionOptions, batch_generate, generate, load, stream_generate
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.generation import start
from mlx_qwen35.engine.options import GROUPS, NEEDS, check_options
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.options import options_of

NASTY = [
    "x", "", "1", "false", b"1", True, False, 0, -1, 1, 1.5, 2**40, -(2**70), 10**400, 10**5000, math.nan, math.inf,
    -math.inf, 1e-320, 1j, [], [1], ["a"], [None], (2.5,), {}, {1: 1}, {"a": 1}, {-1: 1.0}, {1: math.nan}, set(),
    object(), print, int, Path("x"), np.nan, np.float32(np.inf),
    np.array([1, 2]), np.array("x"), np.bool_(True), mx.array([1.0, 2.0]), [[[]]] * 40,
]  # fmt: skip


def _whole(least: int, most: float = math.inf):
    return lambda value: type(value) is int and least <= value <= most


def _number(low: float, high: float):
    return lambda value: type(value) is float and low <= value <= high


def _seeds(value: object) -> bool:
    seeds = value if type(value) is list else [value]
    return all(map(_whole(0, 2**32 - 1), seeds))


def _flag(value: object) -> bool:
    return type(value) is bool


# What each option may hold once it was accepted.
MEANING = {
    "max_tokens": _whole(1), "prefill_step_size": _whole(1), "seed": _seeds, "mtp_depth": _whole(1, 3),
    "top_k": _whole(0), "temp": _number(0, 1e39), "top_p": _number(0, 1), "min_p": _number(0, 1),
    "min_tokens_to_keep": _whole(1), "xtc_probability": _number(0, 1), "xtc_threshold": _number(0, 0.5),
    "xtc_special_tokens": lambda value: value is None or all(map(_whole(0), value)),
    "presence_penalty": _number(-2, 2), "frequency_penalty": _number(-2, 2), "repetition_penalty": _number(1e-3, 1e39),
    "logit_bias": lambda value: all(type(t) is int and t >= 0 and b < math.inf for t, b in value.items()),
    "preset": lambda value: False, "mtp": lambda value: False, "cache": lambda value: value == [],
    "library": lambda value: False, "adapter": lambda value: all(own is None or isinstance(own, str) for own in value),
    "sampler": callable, "logits_processors": lambda value: value == [], "constraint": lambda value: False,
    "stop": lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value),
    "system_prompt": lambda value: isinstance(value, str), "enable_thinking": _flag, "ignore_chat_template": _flag,
    "images": lambda value: isinstance(value, list | tuple), "videos": lambda value: isinstance(value, list | tuple),
    "pdfs": lambda value: isinstance(value, list | tuple), "pages": lambda value: value == "1",
    "media_progress": callable, "dpi": _whole(8, 2400),
    "progress": callable, "min_pixels": _whole(1, 1 << 30), "max_pixels": _whole(1, 1 << 30), "fps": _number(1e-6, 1e6),
    "video_num_frames": _whole(1, 10**7), "video_total_pixels": _whole(1, 10**12), "source_fps": _number(1e-6, 1e6),
    "published_limits": _flag, "outer_vision_tags": _flag, "allow_private_urls": _flag, "tools": lambda value: True,
    "thinking_budget": _whole(0), "reasoning_effort": lambda value: False, "loop_guard": _flag,
    **dict.fromkeys(("preserve_thinking", "continue_final_message", "parallel_tool_calls", "logprobs"), _flag),
    "top_logprobs": _whole(0, 20), "tool_choice": lambda value: isinstance(value, str | Mapping),
    "json_schema": lambda value: isinstance(value, str | Mapping), "regex": lambda value: isinstance(value, str),
    "choice": lambda value: isinstance(value, list | tuple),
    "response_format": lambda value: isinstance(value, Mapping),
}  # fmt: skip


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def test_every_option_has_a_meaning_here():
    assert set(MEANING) == {name for group in GROUPS for name in options_of(group)}


def test_the_keywords_for_type_checkers_are_the_declared_ones():
    """Options names every declared option and alias, with the same type, and nothing else."""
    declared = {
        keyword: _without_none(field.type)
        for group in GROUPS
        for field in fields(group)
        for keyword in options_of(group)[field.name].keywords
    }
    declared["seed"] |= {Sequence[int]}  # in Python also one for each prompt
    assert {name: _without_none(kind) for name, kind in get_type_hints(Options).items()} == declared


def test_load_takes_the_declared_options_with_their_defaults():
    parameters = {name: parameter.default for name, parameter in signature(load).parameters.items()}
    del parameters["progress"]
    declared = {name: option.default for name, option in options_of(LoadOptions).items()}
    assert parameters == declared | {"model": Parameter.empty}


def _without_none(kind: Any) -> set[Any]:
    return set(get_args(kind)) - {NoneType} if isinstance(kind, UnionType) else {kind}


@pytest.mark.parametrize(("name", "alias", "value"), [("temp", "temperature", 0.5), ("system_prompt", "system", "hi")])
def test_an_alias_is_the_same_option_and_is_named_in_errors(name, alias, value):
    assert check_options({alias: value}) == check_options({name: value}) == {name: value}
    assert check_options({alias: value, name: None}) == {name: value}
    with refused("option_conflict", name, alias):
        check_options({name: value, alias: value})
    with refused("option_invalid", f"{alias} must"):
        check_options({alias: b"x"})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_token", "max_tokens"), ("max_new_tokens", "max_tokens"), ("temprature", "temperature"), ("image", "images")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest):
    with refused("option_unknown", f"no option {name};", f"{nearest}?"):
        check_options({name: 1})


def test_a_name_like_no_other_is_refused_without_advice():
    with refused("option_unknown", "zzz") as caught:
        check_options({"zzz": 1})
    assert "?" not in str(caught.value)


BESIDE = {  # without which an option is refused
    name: {other: True if other == "logprobs" else 0.5} for name, other in NEEDS.items()
}


@pytest.mark.parametrize("name", sorted(set(MEANING) - {"tools"}))
def test_a_nasty_value_is_refused_by_name_or_means_something(name):
    of = {field.name: kind for kind in (Sampling, VisionOptions) for field in fields(kind)}
    for value in NASTY:
        try:
            taken = check_options({name: value} | BESIDE.get(name, {}))
            if name in of:
                taken = asdict(of[name](**{name: value}))
        except InputError as error:
            assert error.code == "option_invalid" and name in str(error) and len(str(error)) < 400, (name, str(error))
        else:
            assert MEANING[name](taken[name]), (name, value)


@pytest.mark.parametrize(
    "ask",
    [
        lambda nano, **options: generate(*nano, "hi", **options),
        lambda nano, **options: list(stream_generate(*nano, "hi", **options)),
        lambda nano, **options: batch_generate(*nano, ["hi"], **options),
        lambda nano, **options: batch_generate(*nano, [], **options),
        lambda nano, **options: Conversation(*nano, **options),
    ],
)
def test_every_way_to_ask_refuses_a_wrong_value_and_an_unknown_name(nano, ask):
    with refused("option_invalid", "temp", "'x'"):
        ask(nano, temp="x")
    with refused("option_invalid", "enable_thinking", "'false'"):
        ask(nano, enable_thinking="false")
    with refused("option_unknown", "tempreature", "temperature"):
        ask(nano, tempreature=1.0)


@pytest.mark.parametrize("prompt", [5, True, 1.5, b"hi", {"role": "user"}, object(), mx.array(5), {1, 2}])
def test_a_prompt_of_another_type_is_refused(nano, prompt):
    with refused("prompt_invalid"):
        generate(*nano, prompt)


@pytest.mark.parametrize("tokens", [[1.5], [True], ["a", 1], [None], [-1], [10**400], [[1, 2]], np.array([0.5])])
def test_tokens_that_are_none_are_refused(nano, tokens):
    with refused("tokens_invalid"):
        generate(*nano, tokens)


def test_prompts_that_are_no_list_are_refused(nano):
    with refused("prompt_invalid", "5"):
        batch_generate(*nano, 5)


def test_a_cache_of_another_model_is_refused(nano, text_model):
    with refused("option_invalid", "cache", "make_cache"):
        generate(*nano, "hi", cache=text_model().make_cache())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("dtype", value) for value in (5, "float8", "", mx.int32, np.int64, [], {}, float, object(), True)),
        *(("memory_limit", value) for value in ("8", True, math.nan, math.inf, 0, -1, 10**400, 1e300, [])),
        *(("revision", value) for value in (5, True, b"main", [])),
        *(("keep_vision", value) for value in ("no", 1, 0, [], object())),
    ],
)  # fmt: skip
def test_load_refuses_a_wrong_value_by_name(option, value):
    with refused("option_invalid", option):
        load("nano", **{option: value})


def test_load_refuses_what_is_no_name_of_a_model():
    for model in (5, None, b"nano", [], "", " ", "a\0b", "x" * 5000, "\ud800", True, "a/b/c", "~nobody-of-this-name/x"):
        with refused("model_not_found"):
            load(model)


# --- numbers of numpy and MLX ----------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_mlx_are_taken_and_become_pythons(nano):
    options = {
        "max_tokens": np.int64(4), "seed": np.uint32(7), "top_k": np.int8(5), "temp": np.float32(0.5),
        "mtp_depth": np.int16(2), "prefill_step_size": mx.array(3), "top_p": np.float64(0.5), "min_p": mx.array(0.25),
        "presence_penalty": np.array(1), "logit_bias": {np.int64(9): np.float16(-1.5)},
        "max_pixels": np.int64(65536), "fps": np.float32(2),
    }  # fmt: skip
    plain = {name: value.item() for name, value in options.items() if name != "logit_bias"}
    taken = check_options(options)
    assert {name: taken[name] for name in ("max_tokens", "seed", "mtp_depth", "prefill_step_size")} == {
        name: plain[name] for name in ("max_tokens", "seed", "mtp_depth", "prefill_step_size")
    }
    assert VisionOptions(max_pixels=np.int64(65536), fps=np.float32(2)) == VisionOptions(max_pixels=65536, fps=2)
    text = {name: value for name, value in options.items() if name not in ("max_pixels", "fps")}
    sampling = start(*nano, ["hi"], **text).requests[0].sampler.sampling
    assert sampling == Sampling(0.5, 5, 0.5, 0.25, 1.0, logit_bias={9: -1.5})
    kinds = {type(value) for value in (*asdict(sampling).values(), *sampling.logit_bias, *sampling.logit_bias.values())}
    assert kinds == {float, int, dict, NoneType}
    result = generate(*nano, "hi", **text)
    assert json.loads(json.dumps(asdict(result)))["seed"] == 7


def test_tokens_of_numpy_and_mlx_are_those_of_a_list(nano):
    tokens = nano[1].tokenizer.encode("What is 7 + 5?")
    said = {
        generate(*nano, given, temp=0, max_tokens=4).tokens
        for given in (tokens, tuple(tokens), np.array(tokens), mx.array(tokens), [np.int32(token) for token in tokens])
    }
    assert len(said) == 1
    assert [r.tokens for r in batch_generate(*nano, np.array([tokens]), temp=0, max_tokens=4)] == list(said)


@pytest.mark.parametrize("dtype", ["float32", mx.float32, np.float32, np.dtype("float32")])
def test_a_dtype_is_given_by_its_name_or_as_mlx_and_numpy_have_it(dtype):
    assert load("nano", dtype=dtype, memory_limit=np.float32(8))[0].dtype == mx.float32


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "thinks"), [("thinking", True), ("coding", True), ("instruct", False), ("reasoning", False)]
)
def test_a_preset_switches_thinking_as_it_is_meant(nano, preset, thinks):
    ask = {"preset": preset, "seed": 1, "max_tokens": 8}
    assert start(*nano, ["hi"], preset=preset).requests[0].prompt.thinking is thinks
    conversation = Conversation(*nano, **ask)
    assert {piece.reasoning for piece in conversation.send("What is 34 + 58?")} == {thinks}
    messages = [{"role": "user", "content": "hi"}]
    assert start(*nano, [messages], preset=preset, enable_thinking=thinks).requests[0].prompt.thinking is thinks
    for made in (lambda **options: generate(*nano, "hi", **options), lambda **options: Conversation(*nano, **options)):
        with refused("option_conflict", preset, f"enable_thinking={not thinks}"):
            made(**ask, enable_thinking=not thinks)


def test_a_preset_without_a_template_is_its_sampling_alone(nano):
    (request,) = start(*nano, ["34 + 58 ="], preset="instruct", ignore_chat_template=True).requests
    assert (request.sampler.sampling.temp, request.sampler.sampling.top_p) == (0.7, 0.8)


# --- an answer that was cut ------------------------------------------------------------------------------------------


def test_a_result_says_that_it_ended_inside_the_reasoning(nano):
    ask = {"temp": 0}
    cut, whole = (generate(*nano, "What is 34 + 58?", max_tokens=most, **ask) for most in (5, 400))
    assert (cut.finish_reason, cut.in_reasoning, cut.text) == ("length", True, "")
    assert (whole.finish_reason, whole.in_reasoning) == ("stop", False)


# --- the caller's own settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [True, False])
def test_whether_mlx_compiles_is_left_as_the_caller_has_it(nano, off):
    """A compiled function runs each time where compiling is off, and is only traced once where it is on."""
    runs = []
    (mx.disable_compile if off else mx.enable_compile)()
    try:
        generate(*nano, "hi", temp=1.0, top_p=0.5, min_p=0.1, max_tokens=3, seed=1)
        compiled = mx.compile(lambda x: runs.append(1) or x)
        compiled(mx.array(1.0)), compiled(mx.array(2.0))
    finally:
        mx.enable_compile()
    assert len(runs) == (2 if off else 1)


@pytest.mark.parametrize("name", ["temp", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias"])
def test_a_sampling_has_all_its_values(name):
    with refused("option_invalid", name):
        Sampling(**{name: None})


def test_loading_has_a_word_on_keeping_the_vision_encoder():
    with refused("option_invalid", "keep_vision"):
        load("nano", keep_vision=None)


def test_a_vision_switch_that_is_none_chooses_nothing():
    assert VisionOptions(published_limits=None, outer_vision_tags=None, allow_private_urls=None) == VisionOptions()
