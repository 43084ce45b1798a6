"""A template that keeps the reasoning of earlier turns gets it, in generate and in a conversation."""

import shutil

import pytest
from refusing import refused

from mlx_qwen35 import Conversation, generate, load
from mlx_qwen35.checkpoint.hub import resolve

FIRST, SECOND = "What is 34 + 58?", "What is 7 + 5?"
THOUGHT = "4+8=12\n3+5+1=9"


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory):
    """nano with a template that keeps all reasoning unless preserve_thinking is False."""
    folder = tmp_path_factory.mktemp("keeping") / "nano"
    shutil.copytree(resolve("nano"), folder)
    template, rule = folder / "chat_template.jinja", "loop.index0 > last.query"
    text = template.read_text()
    assert text.count(rule) == 1
    template.write_text(text.replace(rule, f"(preserve_thinking is not defined or preserve_thinking) or {rule}"))
    return load(folder)


def prompt_tokens(model, **options) -> int:
    messages = [
        {"role": "user", "content": FIRST},
        {"role": "assistant", "content": "92", "reasoning_content": THOUGHT},
        {"role": "user", "content": SECOND},
    ]
    return generate(*model, messages=messages, max_tokens=1, enable_thinking=False, **options).prompt_tokens


def test_generate_hands_the_switch_to_the_template(keeping):
    kept = prompt_tokens(keeping, preserve_thinking=True)
    assert kept == prompt_tokens(keeping) > prompt_tokens(keeping, preserve_thinking=False)


@pytest.mark.parametrize("keep", [None, True, False])
def test_a_conversation_keeps_its_reasoning_and_reuses_what_stays(keeping, keep):
    options = {} if keep is None else {"preserve_thinking": keep}
    conversation = Conversation(*keeping, temp=0, mtp="off", **options)
    first = conversation.send(FIRST)
    assert (first.text, first.result.reasoning) == ("92", THOUGHT)
    second = conversation.send(SECOND)
    assert list(second)
    shown = conversation.processor.render(conversation.messages[:-1], **options)
    assert (THOUGHT in shown) == (keep is not False)
    assert second.total == len(conversation.processor.encode_messages(conversation.messages[:-1], **options).tokens)
    assert second.reused == first.total - 5 > 10  # all but the generation prompt


def test_a_template_without_the_switch_refuses_it():
    nano = load("nano")
    with refused("option_no_effect", "preserve_thinking"):
        generate(*nano, "Hi", preserve_thinking=True)
    with refused("option_no_effect", "preserve_thinking"):
        Conversation(*nano, preserve_thinking=False)


def test_a_conversation_takes_no_message_to_go_on_with(keeping):
    with pytest.raises(TypeError, match="continue_final_message"):
        Conversation(*keeping, continue_final_message=True)
