"""What was read once is not read again: by generate, in batches, in conversations that are edited, and in sessions."""

import base64
import gc
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from engine.agent_session import requests, tools
from memory_use import active
from refusing import refused

from mlx_qwen35 import Conversation, VisionOptions, batch_generate, generate, load, read_image
from mlx_qwen35.cache.prefix import READING
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import Generation, start

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
SHAPES, TRIANGLE = PICTURES / "shapes.png", PICTURES / "triangle.png"
SYSTEM = {"role": "system", "content": "You answer in one short sentence, and never more than that."}
ASK, OTHER = "What is 34 + 58?", "Who are you?"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def ask(nano):
    """(messages, library) -> the result of a prompt, with a token of an answer."""
    library = nano[0].make_library()
    return lambda messages, **options: generate(
        *nano, messages=messages, **{"max_tokens": 1, "temp": 0, "library": library} | options
    )


def user(content) -> dict:
    return {"role": "user", "content": content}


@pytest.mark.full
@pytest.mark.parametrize("reasoning", [True, pytest.param(False, marks=pytest.mark.full)])
def test_an_agent_s_session_reads_at_most_9_percent_of_its_prompts(nano, ask, reasoning):
    library, results = nano[0].make_library(), []
    for messages in requests(8, reasoning):
        results.append(ask(messages, tools=tools(96), library=library))
    total = sum(result.prompt_tokens for result in results)
    read = total - sum(result.cached_tokens for result in results)
    assert len(results) == 27 and read == library.counts.read <= 0.09 * total
    assert library.counts.reused == total - read


def test_an_answer_is_that_of_a_prompt_read_whole(nano, ask):
    for messages in ([SYSTEM, user(ASK)], [SYSTEM, user(OTHER)], [SYSTEM, user(ASK)]):
        warm = ask(messages, max_tokens=40, temp=0.8, seed=3)
        cold = generate(*nano, messages=messages, max_tokens=40, temp=0.8, seed=3)
        assert (warm.text, warm.tokens) == (cold.text, cold.tokens)
        assert warm.prompt_tokens == cold.prompt_tokens and cold.cached_tokens == 0
    assert 0 < warm.prompt_tokens - warm.cached_tokens < 10


def test_raw_text_and_tokens_are_remembered(nano):
    library = nano[0].make_library()
    options = {"library": library, "max_tokens": 1, "temp": 0}
    tokens = list(range(20, 60))
    assert [generate(*nano, prompt=tokens, **options).cached_tokens for _ in range(2)] == [0, 39]
    assert generate(*nano, prompt=[*tokens, 7, 8], **options).cached_tokens == 39
    raw = {"ignore_chat_template": True} | options
    assert [generate(*nano, prompt=ASK, **raw).cached_tokens > 0 for _ in range(2)] == [False, True]


def test_a_prompt_that_only_parts_behind_the_system_is_remembered_to_its_end(nano):
    library, processor = nano[0].make_library(), nano[1]
    prompt = processor.encode_messages([SYSTEM, user(ASK)], VisionOptions(), add_generation_prompt=False)
    (request,) = start(*nano, [ASK], library=library, max_tokens=1).requests
    request.prompt = prompt
    list(Generation(nano[0], [request]))
    kinds = [(entry.kind, len(entry.prefix)) for entry in library.entries()]
    assert kinds == [("system", prompt.marks[0].length), ("turn", len(prompt.tokens) - 1)]


def test_a_prefill_that_was_cancelled_counts_all_that_was_read(nano):
    library, model = nano[0].make_library(), nano[0]
    stream = start(*nano, [list(range(20, 200))], library=library, max_tokens=1, prefill_step_size=32)
    (request,), engine = stream.requests, Engine(model)
    engine.add(request)
    engine.step()
    model(mx.array([[52, 53]]), request.own)  # a chunk that was read when it was cancelled, and not told of
    engine.cancel(request)
    assert [len(entry.prefix) for entry in library.entries()] == [34] and library.counts.read == 34


def test_prompts_of_a_batch_read_their_common_beginning_once(nano):
    prompts = [[SYSTEM, user(question)] for question in (ASK, OTHER, ASK)]
    results = batch_generate(*nano, prompts, max_tokens=8, temp=0, library=nano[0].make_library())
    alone = [generate(*nano, messages=messages, max_tokens=8, temp=0) for messages in prompts]
    assert [result.tokens for result in results] == [result.tokens for result in alone]
    first, second, third = (result.cached_tokens for result in results)
    assert first == 0 < second < third


def test_the_same_pixels_by_path_bytes_and_url_are_one_prompt_and_others_are_not(ask):
    data = SHAPES.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [SHAPES, str(SHAPES), data, url, read_image(SHAPES)]
    cached = [ask([SYSTEM, user([{"type": "image", "image": source}, {"type": "text", "text": "What?"}])]).cached_tokens
              for source in sources]  # fmt: skip
    assert cached[0] == 0 < min(cached[1:]) and len(set(cached[1:])) == 1
    pixels = np.zeros((64, 64, 3), np.uint8)
    system = ask([SYSTEM, user(ASK)]).cached_tokens
    for other in (TRIANGLE, pixels):
        shown = [SYSTEM, user([{"type": "image", "image": other}, {"type": "text", "text": "What?"}])]
        assert ask(shown).cached_tokens == system


def test_a_library_of_another_model_and_one_beside_a_cache_are_refused(nano):
    model, processor = nano
    with refused("option_invalid", "library"):
        generate(model, processor, ASK, library=load("nano")[0].make_library())
    with refused("option_invalid", "library"):
        Conversation(model, processor, library=load("nano")[0].make_library())
    with refused("option_conflict", "library", "cache"):
        generate(model, processor, ASK, library=model.make_library(), cache=model.make_cache())
    with refused("option_invalid", "memory"):
        model.make_library(-1)


@pytest.mark.core(1)
@pytest.mark.parametrize("mtp", ["off", "on"])
def test_a_prefill_that_was_cancelled_goes_on_where_it_was(nano, mtp):
    class Stop(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 64:
            raise Stop

    library, prompt = nano[0].make_library(), list(range(20, 200))
    options = {"prefill_step_size": 32, "temp": 0, "max_tokens": 8, "mtp": mtp}
    with pytest.raises(Stop):
        generate(*nano, prompt=prompt, library=library, progress=stop, **options)
    assert [(len(entry.prefix), entry.kind) for entry in library.entries()] == [(64, READING)]
    warm = generate(*nano, prompt=prompt, library=library, **options)
    assert warm.cached_tokens == 64 and warm.tokens == generate(*nano, prompt=prompt, **options).tokens


def test_progress_counts_what_is_read(nano, ask):
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        result = ask([SYSTEM, user(ASK)], progress=lambda done, total: seen.append((done, total)))
    left = result.prompt_tokens - result.cached_tokens
    assert seen[-1] == (left, left)


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(nano):
    return lambda **options: Conversation(*nano, **{"system_prompt": SYSTEM["content"], "max_tokens": 12} | options)


def said(conversation: Conversation, *questions: str) -> list:
    turns = [conversation.send(question) for question in questions]
    assert all(list(turn) for turn in turns)
    return turns


def test_after_an_edit_what_stands_before_it_is_not_read_again(nano, talk):
    conversation = talk(temp=0)
    first, second, third = said(conversation, ASK, OTHER, ASK)
    assert first.reused == 0 < second.reused < third.reused
    conversation.messages[3] = user("What is your name?")  # the second question
    conversation.messages[4:] = []
    turn = conversation.send(ASK)
    assert turn.text == generate(*nano, messages=[*conversation.messages[:-1]], max_tokens=12, temp=0).text
    assert turn.reused == first.total - 5  # without its generation prompt


def test_another_system_prompt_is_read_anew_and_the_old_one_is_still_known(talk):
    conversation = talk()
    said(conversation, ASK)
    old = conversation.messages[0]
    conversation.messages[:] = [{"role": "system", "content": "Speak."}]
    assert said(conversation, ASK)[0].reused == 0
    conversation.messages[:] = [old]
    (turn,) = said(conversation, ASK)
    assert 0 < turn.total - turn.reused < 10


@pytest.mark.core(1)
@pytest.mark.parametrize("mtp", ["off", "on"])
def test_another_answer_reads_its_generation_prompt_alone(talk, mtp):
    conversation = talk(temp=3.0, seed=1, max_tokens=24, mtp=mtp)
    first, second = said(conversation, ASK, OTHER)
    again = conversation.regenerate()
    assert again.text == second.text and again.total - again.reused < 10
    assert len(conversation.messages) == 5
    assert any(conversation.regenerate(seed=seed).text != second.text for seed in range(2, 12))
    assert first.text == conversation.messages[2]["content"]


def test_without_an_answer_there_is_no_other(talk):
    with refused("messages_invalid", "regenerate"):
        talk().regenerate()


def test_another_answer_is_refused_where_the_answer_is_gone_when_it_starts(talk):
    conversation = talk(temp=0)
    said(conversation, ASK)
    turn = conversation.regenerate()
    conversation.messages.append(user(OTHER))
    with refused("messages_invalid", "regenerate"):
        list(turn)
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant", "user"]
    conversation.messages.pop()
    turn = conversation.regenerate()
    conversation.reset()
    with refused("messages_invalid", "regenerate"):
        list(turn)


def test_a_fork_goes_on_by_itself_with_what_was_read(talk):
    conversation = talk(temp=0)
    said(conversation, ASK)
    other = conversation.fork()
    (mine,), (its,) = said(conversation, OTHER), said(other, "And what is 2 + 2?")
    assert mine.reused == its.reused > 0
    assert [len(one.messages) for one in (conversation, other)] == [5, 5]
    assert conversation.messages[-2] != other.messages[-2]


def test_conversations_share_a_library(nano, talk):
    library = nano[0].make_library()
    for expected in (False, True):
        (turn,) = said(talk(library=library), ASK)
        assert bool(turn.reused) == expected


def test_the_newest_place_of_a_conversation_stays_whatever_the_cap(nano, talk):
    conversation = talk(library=nano[0].make_library(0))
    turns = said(conversation, ASK, OTHER, ASK)
    assert all(later.reused == earlier.total - 5 for earlier, later in pairwise(turns))
    conversation.reset()
    assert not conversation.library.entries()


@pytest.mark.full
@pytest.mark.parametrize("turns", [20, pytest.param(300, marks=pytest.mark.full)])
def test_many_turns_hold_weights_the_cache_and_a_constant(nano, talk, turns):
    conversation = talk(max_tokens=1, enable_thinking=False, temp=0, library=nano[0].make_library(0.001))
    gc.collect()
    before = active()
    for _ in range(turns):
        said(conversation, "And?")
    gc.collect()
    assert active() - before < 2 * conversation.cache.nbytes + 1_500_000  # its own, with the states of the places kept


@pytest.mark.full
def test_many_steps_hold_the_cache_and_a_constant(nano):
    model, processor = nano
    library = model.make_library(0)
    generate(model, processor, ASK, max_tokens=40, mtp="on", library=library)  # loads the draft head
    gc.collect()
    before = active()
    result = generate(model, processor, ASK, max_tokens=2048, logit_bias=dict.fromkeys(processor.stop_ids, -1e9),
                      mtp="on", temp=1.0, seed=0, library=library)  # fmt: skip
    gc.collect()
    assert result.generation_tokens == 2048 and active() - before < 100_000
