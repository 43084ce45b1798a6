"""Conversations -> prompt text: every case of the chat template, on nano's and, where given, on the published one.

The expected strings are written out here; that the processor adds nothing of its own is checked against transformers.
"""

from pathlib import Path

import pytest
from refusing import refused
from transformers import AutoTokenizer

from mlx_qwen35 import Processor
from mlx_qwen35.checkpoint.config import read_config

USER = {"role": "user", "content": "Hi"}
CITY = {"name": "get_weather", "arguments": {"city": "Köln", "opts": {"a": True}}}
VALUES = {"on": True, "none": None, "n": 3, "l": [1, "é"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


THINK = "<|im_start|>assistant\n<think>\n"
NO_THINK = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n"
    '<parameter=opts>\n{"a": true}\n</parameter>\n</function>\n</tool_call>'
)

# name: messages, options of the template, what must come out
CASES = {
    "thinking is the default": ([USER], {}, turn("user", "Hi") + THINK),
    "thinking on": ([USER], {"enable_thinking": True}, turn("user", "Hi") + THINK),
    "thinking off": ([USER], {"enable_thinking": False}, turn("user", "Hi") + NO_THINK),
    "no generation prompt": ([USER], {"add_generation_prompt": False}, turn("user", "Hi")),
    "system": (
        [{"role": "system", "content": "Be brief."}, USER],
        {},
        turn("system", "Be brief.") + turn("user", "Hi") + THINK,
    ),
    "empty system turn stays": (
        [{"role": "system", "content": ""}, USER],
        {},
        turn("system", "") + turn("user", "Hi") + THINK,
    ),
    "content is trimmed": ([{"role": "user", "content": "  Hi \n"}], {}, turn("user", "Hi") + THINK),
    "content in parts": (
        [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
        {},
        turn("user", "Hi") + THINK,
    ),
    "null content": (
        [USER, {"role": "assistant", "content": None}, USER],
        {},
        turn("user", "Hi") + turn("assistant", "") + turn("user", "Hi") + THINK,
    ),
    "reasoning before the last query is dropped": (
        [
            {"role": "user", "content": "Q1"},
            {"role": "assistant", "content": "A1", "reasoning_content": "R1"},
            {"role": "user", "content": "Q2"},
            {"role": "assistant", "content": "<think>\nR2\n</think>\n\nA2"},
            {"role": "user", "content": "Q3"},
        ],
        {},
        turn("user", "Q1")
        + turn("assistant", "A1")
        + turn("user", "Q2")
        + turn("assistant", "A2")
        + turn("user", "Q3")
        + THINK,
    ),
    "reasoning after the last query stays": (
        [USER, {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"}],
        {"add_generation_prompt": False},
        turn("user", "Hi") + turn("assistant", "<think>\nR\n</think>\n\nA"),
    ),
    "even empty reasoning, after the last query": (
        [USER, {"role": "assistant", "content": "A"}],
        {"add_generation_prompt": False},
        turn("user", "Hi") + turn("assistant", "<think>\n\n</think>\n\nA"),
    ),
    "two tool calls and their results": (
        [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "need tool",
                "tool_calls": [{"type": "function", "function": CITY}, {"function": CITY}],
            },
            {"role": "tool", "content": "18C"},
            {"role": "tool", "content": "25C"},
        ],
        {},
        turn("user", "Weather?")
        + turn("assistant", f"<think>\nneed tool\n</think>\n\n{CALL}\n{CALL}")
        + turn("user", "\n<tool_response>\n18C\n</tool_response>\n<tool_response>\n25C\n</tool_response>").replace(
            "user\n\n<tool_response>", "user\n<tool_response>"
        )
        + THINK,
    ),
    "text before a tool call, and values that are not text": (
        [
            USER,
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [
                    {"function": {"name": "f", "arguments": {"on": True, "none": None, "n": 3, "l": [1, "é"]}}}
                ],
            },
        ],
        {"add_generation_prompt": False},
        turn("user", "Hi")
        + turn(
            "assistant",
            "<think>\n\n</think>\n\nLet me see.\n\n<tool_call>\n<function=f>\n<parameter=on>\nTrue\n</parameter>\n"
            "<parameter=none>\nNone\n</parameter>\n<parameter=n>\n3\n</parameter>\n"
            '<parameter=l>\n[1, "é"]\n</parameter>\n</function>\n</tool_call>',
        ),
    ),
}

REFUSED = {
    "no messages": [],
    "no user query": [{"role": "assistant", "content": "A"}],
    "unknown role": [USER, {"role": "narrator", "content": "D"}],
    "unknown part": [{"role": "user", "content": [{"type": "sound", "sound": "x"}]}],
}


@pytest.mark.parametrize("name", CASES)
def test_rendering(processor: Processor, folder: Path, name: str):
    messages, options, expected = CASES[name]
    assert processor.render(messages, **options) == expected
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, **{"add_generation_prompt": True} | options
    )
    assert theirs == expected


@pytest.mark.parametrize("name", REFUSED)
def test_messages_that_the_template_refuses_are_an_input_error(processor: Processor, name: str):
    with refused("chat_template_refused"):
        processor.render(REFUSED[name])


def test_tools_stand_in_the_system_turn_one_a_line_with_the_system_text_after_them(processor: Processor):
    text = processor.render([{"role": "system", "content": "Sys."}, USER], tools=TOOLS)
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\n# Tools\n\n")
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather", "parameters": ' in system
    assert system.endswith("\n\nSys.")
    assert rest == turn("user", "Hi") + THINK


@pytest.mark.parametrize(
    "part", [{"type": "image", "image": "cat.png"}, {"image_url": "x"}, {"type": "video", "video": "v"}]
)
def test_a_checkpoint_without_a_tower_refuses_a_picture_or_clip_and_never_ignores_it(folder: Path, part: dict):
    processor = Processor.from_folder(folder, read_config(folder), has_vision_encoder=False)
    with refused("vision_missing"):
        processor.encode_messages([{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}])


# --- tokens ----------------------------------------------------------------------------------------------------------

PUBLISHED_TOKENS = {
    "\n": [198],
    "\n\n": [271],
    "user": [846],
    "assistant": [74455],
    "Hello": [9419],
    "What is 2+2?": [3710, 369, 220, 17, 10, 17, 30],
    "Hello, how are you?": [9419, 11, 1204, 513, 488, 30],
}
CHAT_HEAD = [248045, 846, 198, 3710, 369, 220, 17, 10, 17, 30, 248046, 198, 248045, 74455, 198]


def test_published_tokens(real_model: Path):
    processor = Processor.from_folder(real_model, read_config(real_model))
    for text, tokens in PUBLISHED_TOKENS.items():
        assert list(processor.encode_text(text).tokens) == tokens, text
    question = [{"role": "user", "content": "What is 2+2?"}]
    assert list(processor.encode_messages(question).tokens) == [*CHAT_HEAD, 248068, 198]
    quiet = processor.encode_messages(question, enable_thinking=False)
    assert list(quiet.tokens) == [*CHAT_HEAD, 248068, 271, 248069, 271]
    assert processor.stop_ids == {248046, 248044}
    assert processor.vocabulary == 248077  # the head's rows beyond are padding


def test_a_prompt_knows_whether_it_opens_a_thinking_block(processor: Processor):
    assert processor.encode_messages([USER]).thinking
    assert not processor.encode_messages([USER], enable_thinking=False).thinking
    assert not processor.encode_text("Hello").thinking
    assert processor.encode_text("<think>\n2 + 2").thinking


def test_both_end_tokens_stop(processor: Processor):
    vocabulary = processor.tokenizer.get_vocab()
    assert {vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]} <= processor.stop_ids
