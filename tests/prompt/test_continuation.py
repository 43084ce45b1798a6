"""With continue_final_message a prompt ends inside its last message, with the token ids that transformers makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusing import refused

from mlx_qwen35 import Processor, generate, load

HI = {"role": "user", "content": "Hi"}
TALK = [{"role": "system", "content": "S"}, HI, {"role": "assistant", "content": "A", "reasoning_content": "R"}, HI]


def answer(content: Any = None, **fields: Any) -> dict:
    return {"role": "assistant", "content": content, **fields}


# name: last message, the field in which it goes on, how the prompt ends
CASES = {
    "content": (answer("The sum"), "content", "<think>\n\n</think>\n\nThe sum"),
    "content that ends in blanks": (answer("The sum \n"), "content", "</think>\n\nThe sum"),
    "content that begins with blanks": (answer("\n The sum"), "content", "</think>\n\nThe sum"),
    "content in parts": (
        answer([{"type": "text", "text": "The"}, {"type": "text", "text": " sum"}]),
        "content",
        "</think>\n\nThe sum",
    ),
    "reasoning, closed, and content": (
        answer("The sum", reasoning_content="1+1"),
        "content",
        "<think>\n1+1\n</think>\n\nThe sum",
    ),
    "reasoning by another name": (answer("The sum", reasoning="1+1"), "content", "<think>\n1+1\n</think>\n\nThe sum"),
    "reasoning alone": (answer(reasoning_content="1+1"), "reasoning_content", "<|im_start|>assistant\n<think>\n1+1"),
    "reasoning alone, beside a blank content": (
        answer("", reasoning="1+1\n"),
        "reasoning_content",
        "<|im_start|>assistant\n<think>\n1+1",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_ends_inside_its_last_message(processor: Processor, folder: Path, read_theirs: Callable, name: str):
    last, field, end = CASES[name]
    messages = [*TALK, last]
    text = processor.render(messages, continue_final_message=True)
    assert text.endswith(end) and text.count("<|im_start|>") == 5
    prompt = processor.encode_messages(messages, continue_final_message=True)
    assert prompt.thinking == (field == "reasoning_content")
    if last["content"] is None:
        last = {**last, "content": ""}
    theirs = read_theirs(folder).apply_chat_template([*TALK, last], continue_final_message=field, return_dict=False)
    assert list(prompt.tokens) == theirs


def test_a_control_token_in_the_message_stays_text(processor: Processor):
    messages = [HI, answer("a <|im_end|>")]
    prompt = processor.encode_messages(messages, continue_final_message=True)
    assert processor.render(messages, continue_final_message=True).endswith("a <|im_end|>")
    assert len([token for token in prompt.tokens if token in processor.stop_ids]) == 1  # the user's turn ends


@pytest.mark.parametrize(
    ("messages", "facts"),
    [
        ([HI], ("user",)),
        ([HI, answer("A"), {"role": "tool", "content": "x"}], ("tool",)),
        ([HI, answer("A", tool_calls=[{"function": {"name": "f"}}])], ("tool_calls",)),
        ([HI, answer(" \n")], ("none",)),
        ([HI, answer([])], ("none",)),
        ([HI, answer(reasoning_content=" ")], ("none",)),
    ],
)
def test_a_last_message_that_cannot_go_on_is_refused(processor: Processor, messages: list, facts: tuple):
    with refused("messages_invalid", "continue_final_message", *facts):
        processor.encode_messages(messages, continue_final_message=True)


def test_it_is_refused_beside_a_new_message(processor: Processor):
    with refused("option_conflict", "continue_final_message", "add_generation_prompt"):
        processor.render([HI, answer("A")], continue_final_message=True, add_generation_prompt=True)


def test_generate_goes_on_with_the_message_and_gives_what_comes_behind_it():
    nano = load("nano")
    messages = [{"role": "user", "content": "What is 34 + 58?"}, answer(reasoning_content="4+8=12\n3+5")]
    result = generate(*nano, messages=messages, continue_final_message=True, temp=0)
    assert (result.reasoning, result.text) == ("+1=9", "92")
    messages = [messages[0], answer("9", reasoning_content="4+8=12\n3+5+1=9")]
    result = generate(*nano, messages=messages, continue_final_message=True, temp=0)
    assert (result.reasoning, result.text) == ("", "2")
    for prompt in ({"prompt": "Hi"}, {"prompt": [1, 2]}, {"prompt": "Hi", "ignore_chat_template": True}):
        with refused("option_no_effect", "continue_final_message"):
            generate(*nano, **prompt, continue_final_message=True)
    assert generate(*nano, "Hi", continue_final_message=False, max_tokens=1, enable_thinking=False).tokens
