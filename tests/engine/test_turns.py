"""A turn owns its message and its answer, whenever it is started, left, cancelled or overtaken."""

import threading

import pytest
from refusing import refused

from mlx_qwen35 import load, stream_generate
from mlx_qwen35.engine.conversation import Conversation, Turn
from mlx_qwen35.engine.generation import start
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor

HOW = ("cancel", "leave", "overtake", "close")
QUESTIONS = ("What is 34 + 58?", "Who are you?", "What is 3 + 4?")


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


@pytest.fixture
def talk(nano):
    return lambda **options: Conversation(*nano, seed=1, max_tokens=24, **options)


def pieces_of(talk) -> int:
    """How many pieces the first answer has."""
    return len(list(talk().send(QUESTIONS[0])))


def roles(conversation: Conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]



def test_a_turn_has_its_text_its_pieces_and_its_result(talk):
    turn = talk().send(QUESTIONS[0])
    assert turn.result is None and turn.total == turn.reused == 0 and turn.prefill_seconds == 0
    assert turn.text == turn.result.text == "".join(str(piece) for piece in turn.pieces if not piece.reasoning)
    assert turn.total == turn.result.prompt_tokens > 0 and turn.prefill_seconds > 0
    assert turn.text == turn.text and list(turn) == []


def test_a_turn_that_never_starts_leaves_no_trace(talk):
    conversation, other = talk(), talk()
    conversation.send("never asked for")
    assert conversation.messages == []
    texts = [conversation.send(question).text for question in QUESTIONS]
    assert texts == [other.send(question).text for question in QUESTIONS]
    assert conversation.messages == other.messages


def test_turns_take_their_places_in_the_order_in_which_they_start(talk):
    conversation = talk()
    first, second = conversation.send(QUESTIONS[0]), conversation.send(QUESTIONS[1])
    assert second.text and first.text
    asked = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert asked == [QUESTIONS[1], QUESTIONS[0]]


@pytest.mark.parametrize("mtp", [pytest.param("off", marks=pytest.mark.full), "on"])
@pytest.mark.parametrize(
    ("how", "every"),
    [("leave", 15), ("overtake", 15), *(pytest.param(how, 1, marks=pytest.mark.full) for how in HOW)],
)
def test_a_turn_left_at_any_piece_keeps_its_answer_so_far_and_the_next_turn_goes_on(talk, how, mtp, every):
    for count in range(1, pieces_of(talk), every):
        conversation = talk(mtp=mtp)
        turn = conversation.send(QUESTIONS[0])
        kept = leave(turn, count, how)
        text = conversation.send(QUESTIONS[1]).text
        assert roles(conversation) == ["user", "assistant"] * 2
        assert conversation.messages[0]["content"] == QUESTIONS[0]
        said = "".join(str(piece) for piece in kept if not piece.reasoning)
        assert conversation.messages[1]["content"] == said == turn.result.text
        assert turn.result.finish_reason == "interrupted"
        told = talk(mtp="off")  # that has the same messages from the start
        told.messages = conversation.messages[:2]
        assert told.send(QUESTIONS[1]).text == text
        assert list(turn) == []


def leave(turn: Turn, count: int, how: str) -> list:
    """Take so many pieces, then leave the turn."""
    if how == "leave":
        kept = []
        for piece in turn:
            kept.append(piece)
            if len(kept) == count:
                break
        return kept
    if how == "close":
        pieces = iter(turn)
        kept = [next(pieces) for _ in range(count)]
        pieces.close()
        return kept
    kept = [next(turn) for _ in range(count)]
    if how == "cancel":
        turn.cancel()
    return kept


def test_a_turn_cancelled_before_its_first_piece_leaves_the_conversation_as_it_was(talk):
    conversation = talk()
    assert conversation.send(QUESTIONS[0]).text
    before = list(conversation.messages)
    turn = conversation.send(QUESTIONS[1])
    turn.cancel()
    assert turn.text == "" and turn.result is None and conversation.messages == before


def test_an_error_in_the_prefill_leaves_the_conversation_as_it_was(talk):
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    conversation, other = talk(), talk()
    assert conversation.send(QUESTIONS[0]).text == other.send(QUESTIONS[0]).text
    turn = conversation.send(QUESTIONS[1], stop)
    with pytest.raises(Stop):
        next(turn)
    assert roles(conversation) == ["user", "assistant"]
    assert conversation.send(QUESTIONS[2]).text == other.send(QUESTIONS[2]).text


def test_reset_ends_the_turn_that_runs(talk):
    conversation = talk()
    turn = conversation.send(QUESTIONS[0])
    next(turn)
    conversation.reset()
    assert conversation.messages == [] and list(turn) == []
    assert conversation.send(QUESTIONS[0]).text == talk().send(QUESTIONS[0]).text


def test_a_generation_runs_once(nano):
    generation = start(*nano, [QUESTIONS[0]], seed=1, max_tokens=8)
    list(generation)
    (result,) = generation.results()
    with refused("generation_spent"):
        list(generation)
    assert generation.results()[0].tokens == result.tokens


# --- threads ----------------------------------------------------------------------------------------------------------


def elsewhere(function):
    """What a function returns in a new thread, which then ends."""
    found: list = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    assert found, "it raised"
    return found[0]


@pytest.mark.parametrize("mtp", ["off", "on"])
def test_each_piece_of_a_stream_may_be_asked_for_in_another_thread(nano, mtp):
    options = {"seed": 3, "max_tokens": 24, "mtp": mtp}
    alone = [str(piece) for piece in stream_generate(*nano, QUESTIONS[0], **options)]
    stream, told = stream_generate(*nano, QUESTIONS[0], **options), []
    while (piece := elsewhere(lambda: next(stream, None))) is not None:
        told.append(str(piece))
    assert told == alone


@pytest.mark.parametrize("mtp", [pytest.param("off", marks=pytest.mark.full), "on"])
def test_a_conversation_goes_on_in_another_thread_at_every_step(nano, talk, mtp):
    expected = [talk(mtp=mtp).send(QUESTIONS[0]).text]
    conversation = elsewhere(lambda: talk(mtp=mtp))
    turn, told = elsewhere(lambda: conversation.send(QUESTIONS[0])), []
    while (piece := elsewhere(lambda: next(turn, None))) is not None:
        told.append(piece)
    assert "".join(str(piece) for piece in told if not piece.reasoning) == expected[0] == turn.result.text
    assert conversation.send(QUESTIONS[1]).text == _second(talk, mtp)


def _second(talk, mtp: str) -> str:
    conversation = talk(mtp=mtp)
    assert conversation.send(QUESTIONS[0]).text
    return conversation.send(QUESTIONS[1]).text


def test_a_cache_made_in_one_thread_works_in_another(nano):
    model, processor = nano
    cache = elsewhere(model.make_cache)
    options = {"temp": 0, "max_tokens": 10, "cache": cache}
    first = elsewhere(lambda: [*stream_generate(model, processor, QUESTIONS[0], **options)])
    second = [*stream_generate(model, processor, QUESTIONS[1], **options)]
    again = model.make_cache()
    for question, said in ((QUESTIONS[0], first), (QUESTIONS[1], second)):
        assert [*stream_generate(model, processor, question, **options | {"cache": again})] == said


def test_two_threads_that_generate_at_once_get_what_each_gets_alone(nano):
    def text(seed: int) -> str:
        return "".join(map(str, stream_generate(*nano, QUESTIONS[0], seed=seed, max_tokens=24)))

    alone = [text(seed) for seed in range(2)]
    found: dict[int, str] = {}
    threads = [threading.Thread(target=lambda s=s: found.__setitem__(s, text(s))) for s in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(2)] == alone
