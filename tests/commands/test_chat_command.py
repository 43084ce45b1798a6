"""mlx_qwen35.chat, and the Conversation behind it."""

import io
import sys

import pytest
from refusing import refused

from mlx_qwen35 import load
from mlx_qwen35.commands.chat import main
from mlx_qwen35.engine.conversation import Conversation, Turn
from mlx_qwen35.generate import generate
from mlx_qwen35.model.model import Model

TURNS = ["What is 34 + 58?", "Add 10 to that.", "Who are you?"]


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def talk(monkeypatch, capsys):
    def session(*lines: str, options: tuple[str, ...] = ("--model", "nano", "--verbose")) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["mlx_qwen35.chat", *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        main()
        out = capsys.readouterr()
        said = [line for line in out.err.splitlines(keepends=True) if not line.endswith(" ...\n")]
        return out.out, "".join(said)  # without progress, which is shown on a slow machine

    return session


def turned(conversation: Conversation, text: str) -> Turn:
    """A turn that has come to its end."""
    turn = conversation.send(text)
    assert turn.text == turn.result.text
    return turn


def said(conversation: Conversation, text: str) -> tuple[int, ...]:
    return turned(conversation, text).result.tokens


@pytest.mark.core(1)
@pytest.mark.parametrize("thinking", [True, False])
def test_each_turn_answers_as_if_the_whole_conversation_were_read_anew(nano, thinking):
    conversation = Conversation(*nano, enable_thinking=thinking, system_prompt="Be brief.", temp=1.1, seed=3)
    messages = [{"role": "system", "content": "Be brief."}]
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        fresh = generate(*nano, messages=messages, enable_thinking=thinking, temp=1.1, seed=3)
        assert said(conversation, text) == fresh.tokens
        messages.append(fresh.message)
    assert conversation.messages == messages


def test_only_the_last_answer_and_the_new_message_are_read(nano, monkeypatch):
    read_tokens = []
    hidden = type(nano[0]).hidden

    def spy(self, tokens, *rest, **options):
        read_tokens.append(tokens.shape[1])
        return hidden(self, tokens, *rest, **options)

    monkeypatch.setattr(type(nano[0]), "hidden", spy)
    conversation = Conversation(*nano, enable_thinking=False, mtp="off")
    before = turned(conversation, TURNS[0]).total
    read_tokens.clear()
    turn = turned(conversation, TURNS[1])
    assert turn.reused > 0
    assert sum(read_tokens) - turn.result.generation_tokens <= turn.total - turn.reused
    assert turn.reused > before - 8  # all but the generation prompt of the turn before


def test_what_was_read_is_kept_and_read_once(nano):
    conversation = Conversation(*nano)
    for number, text in enumerate(TURNS):
        assert (turned(conversation, text).reused > 0) == (number > 0)


def test_an_interrupted_answer_stays_as_far_as_it_came(nano):
    conversation = Conversation(*nano, enable_thinking=False)
    turn = conversation.send(TURNS[2])
    first = next(turn)
    turn.cancel()
    assert conversation.messages[-1] == {"role": "assistant", "content": first.text}
    assert said(conversation, TURNS[1])


def test_an_interruption_while_reading_leaves_the_conversation_as_it_was(nano, monkeypatch):
    conversation = Conversation(*nano)
    said(conversation, TURNS[0])
    messages = list(conversation.messages)

    def interrupted(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(conversation.send(TURNS[1], interrupted))
    assert conversation.messages == messages
    other = Conversation(*nano)
    said(other, TURNS[0])
    assert said(conversation, TURNS[2]) == said(other, TURNS[2])


def test_a_message_that_does_not_fit_is_refused_and_the_conversation_goes_on(nano):
    conversation = Conversation(*nano)
    with refused("context_length_exceeded"):
        list(conversation.send("a " * nano[0].config.max_position_embeddings))
    with refused("message_empty"):
        list(conversation.send("  "))
    assert conversation.messages == []
    assert said(conversation, TURNS[0])


def test_reset_forgets(nano):
    conversation = Conversation(*nano, system_prompt="Be brief.")
    first = said(conversation, TURNS[0])
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert said(conversation, TURNS[0]) == first


@pytest.mark.parametrize("option", ["cache", "ignore_chat_template", "progress"])
def test_options_that_a_conversation_owns_are_refused(nano, option):
    with pytest.raises(TypeError, match=f"a conversation takes no {option}"):
        Conversation(*nano, **{option: object()})


@pytest.mark.parametrize("options", [("--prefill-step-size", "0"), ("--temp", "-1"), ("--seed", "-1")])
def test_a_bad_option_is_told_before_the_session_starts(talk, capsys, options):
    with pytest.raises(SystemExit) as ended:
        talk(TURNS[0], options=("--model", "nano", *options))
    assert ended.value.code == 2
    assert "[option_invalid]" in capsys.readouterr().err


def test_a_session_shows_answers_and_how_much_was_reused(talk, nano):
    out, err = talk(TURNS[0], TURNS[1], "/exit", "never asked", options=("--model", "nano", "--verbose", "--seed", "1"))
    whole = Conversation(*nano, seed=1)
    answers = [turned(whole, text).result for text in TURNS[:2]]
    assert out == "".join(f"<think>\n{answer.reasoning}\n</think>\n\n{answer.text}\n" for answer in answers)
    assert "0 reused" in err.splitlines()[0]
    assert len(err.splitlines()) == 2 and " 0 reused" not in err.splitlines()[1]


def test_reset_help_and_unknown_commands(talk):
    out, err = talk(TURNS[0], "/reset", TURNS[0], "/help", "/fly")
    first, second = (line.split(",")[0] for line in err.splitlines() if line.startswith("[prompt "))
    assert first == second  # as many tokens: nothing came before
    assert "/reset" not in out  # which has answers alone
    assert "/reset" in err and "/fly" in err and "[option_unknown]" in err


def test_an_error_in_a_turn_does_not_end_the_session(talk, nano):
    _, err = talk("a " * nano[0].config.max_position_embeddings, TURNS[1])
    assert "[context_length_exceeded]" in err
    assert "tokens at" in err


def test_ctrl_c_in_an_answer_goes_back_to_the_prompt(talk, monkeypatch):
    hidden, calls = Model.hidden, []

    def interrupt_once(*given, **options):
        calls.append(1)
        if len(calls) == 4:  # the first is over the prompt
            raise KeyboardInterrupt
        return hidden(*given, **options)

    monkeypatch.setattr(Model, "hidden", interrupt_once)
    _, err = talk(TURNS[0], TURNS[1])
    assert "interrupted" in err.splitlines()[0]
    assert "stop" in err.splitlines()[1]


def test_a_conversation_without_a_model_is_refused(talk, capsys):
    with pytest.raises(SystemExit) as ended:
        talk(options=())
    assert ended.value.code == 2
    assert "[option_missing]" in capsys.readouterr().err
