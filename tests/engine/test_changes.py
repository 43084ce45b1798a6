"""What a user changes between turns: options, a message, and that it was said at all."""

import pytest
from refusing import refused

from mlx_qwen35 import Session, load
from mlx_qwen35.engine.conversation import Conversation

QUESTIONS = ("What is 34 + 58?", "Who are you?", "What is 3 + 4?")


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def talk(nano):
    def begun(*questions: str, **options) -> Conversation:
        """A conversation in which these were asked and answered."""
        conversation = Conversation(*nano, **{"seed": 1, "max_tokens": 6, "enable_thinking": False, **options})
        for question in questions:
            assert list(conversation.send(question))
        return conversation

    return begun


def stored(conversation: Conversation, messages: list[dict]) -> int:
    """Tokens of the prompt of these messages that a snapshot of its library holds."""
    tokens = list(conversation.encode(messages).tokens)
    held = [entry.prefix.tokens.tolist() for entry in conversation.library.entries()]
    return max((len(own) for own in held if len(own) < len(tokens) and own == tokens[: len(own)]), default=0)


@pytest.mark.parametrize("thinking", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("way", ["undo", "edit"])
def test_what_was_taken_back_leaves_no_trace_and_nothing_that_is_stored_is_read(talk, way, thinking):
    options = {"enable_thinking": thinking, "temp": 0.9, "system_prompt": "Be brief."}
    options |= {"max_tokens": 40} if thinking else {}
    edited, plain = talk(*QUESTIONS[:2], **options), talk(QUESTIONS[0], **options)
    if way == "undo":
        taken = edited.undo()
        assert taken[0]["content"] == QUESTIONS[1]
        assert edited.messages == plain.messages
        turn = edited.send(QUESTIONS[2])
    else:
        turn = edited.edit(QUESTIONS[2])
    expected = plain.send(QUESTIONS[2])
    held = stored(edited, [*plain.messages, {"role": "user", "content": QUESTIONS[2]}])
    assert turn.text == expected.text and edited.messages == plain.messages
    assert turn.reused == held > 0 and turn.reused >= expected.reused


def test_all_questions_can_be_taken_back(talk):
    conversation = talk(*QUESTIONS[:2], system_prompt="Be brief.")
    assert [conversation.undo()[0]["content"] for _ in range(2)] == [QUESTIONS[1], QUESTIONS[0]]
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    for change in (conversation.undo, lambda: conversation.edit("x")):
        with refused("messages_invalid"):
            change()


def test_an_edit_that_does_not_start_or_has_no_token_changes_nothing(talk):
    conversation = talk(QUESTIONS[0])
    before = list(conversation.messages)
    conversation.edit(QUESTIONS[1])
    turn = conversation.edit(QUESTIONS[2])
    turn.cancel()
    assert turn.text == "" and conversation.messages == before
    with refused("message_empty"):
        conversation.edit(" ")


def test_a_session_that_is_saved_does_not_hold_what_was_taken_back(talk, nano, tmp_path):
    secret = "The secret word is xylophone."
    path = tmp_path / "session"
    with Session.load(path, *nano, seed=1, max_tokens=4, enable_thinking=False) as session:
        for question in (QUESTIONS[0], secret):
            assert session.conversation.send(question).text
        session.save()
        tokens = session.conversation.entries[-1].prefix.tokens
        assert secret in nano[1].decode(tokens.tolist())
        session.conversation.undo()
        assert session.changed
        session.save()
    with Session.load(path, *nano) as session:
        tokens = session.conversation.entries[-1].prefix.tokens
        assert "xylophone" not in nano[1].decode(tokens.tolist())
        assert session.conversation.messages[0]["content"] == QUESTIONS[0]


def test_options_change_from_the_next_turn_on(talk):
    changed, other = talk(QUESTIONS[0]), talk(temp=1.5, seed=7, max_tokens=9)
    before, other.messages = dict(changed.options), list(changed.messages)
    changed.change(temperature=1.5, seed=7, max_tokens=9)
    assert changed.send(QUESTIONS[1]).text == other.send(QUESTIONS[1]).text
    changed.change(temp=None, seed=1, max_tokens=6)
    assert changed.options == before and "temp" not in before


def test_the_thinking_switch_and_the_system_prompt_change_the_prompt_alone(talk):
    changed = talk(QUESTIONS[0])
    changed.change(enable_thinking=True, system="Be brief.", tools=[])
    other = talk(enable_thinking=True, system="Be brief.", tools=[])
    other.messages[1:] = changed.messages[1:]
    assert changed.messages == other.messages and changed.messages[0]["content"] == "Be brief."
    turn, expected = changed.send(QUESTIONS[1]), other.send(QUESTIONS[1])
    assert turn.text == expected.text and turn.result.reasoning == expected.result.reasoning != ""
    changed.change(system_prompt=None)
    assert changed.messages[0]["role"] == "user"
    changed.reset()
    assert changed.messages == []


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"temp": -1}, "option_invalid"),
        ({"temp": 0.5, "top_p": 7}, "option_invalid"),
        ({"temp": 0.5, "temperature": 0.6}, "option_conflict"),
        ({"preset": "thinking"}, "option_conflict"),
        ({"max_token": 5}, "option_unknown"),
        ({"thinking_budget": 5}, "option_conflict"),
        ({"temp": 0.5, "fps": 1, "video_num_frames": 4}, "option_conflict"),
    ],
)
def test_a_bad_change_changes_nothing(talk, options, code):
    conversation = talk(QUESTIONS[0], system_prompt="Be brief.")
    before = (dict(conversation.options), list(conversation.messages), conversation.vision)
    with refused(code):
        conversation.change(**{"system_prompt": "Be long.", "seed": 9, **options})
    assert (conversation.options, conversation.messages, conversation.vision) == before


@pytest.mark.parametrize("name", ["library", "cache", "images"])
def test_what_a_conversation_owns_does_not_change(talk, nano, name):
    with pytest.raises(TypeError, match=name):
        talk().change(**{name: nano[0].make_library()})
