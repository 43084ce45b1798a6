"""The adapter of a request: by name, for each prompt of a batch, in conversations, with images and drafts."""

from pathlib import Path

import numpy as np
import pytest
from adapters.by_hand import made, nano_with
from refusing import refused

from mlx_qwen35 import Conversation, batch_generate, generate, stream_generate
from mlx_qwen35.engine.generation import request

SHAPES = Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png"
ASK = "What is 34 + 58?"
OPTIONS = {"temp": 0, "max_tokens": 8, "enable_thinking": False}
SAID = {"base": "92", "a": "103", "b": "93"}  # to ASK


@pytest.fixture(scope="module")
def nano():
    return nano_with(a=made(1), b=made(2), seeing=made(3, vision=True))


def test_each_prompt_of_a_batch_is_answered_by_its_adapter_as_alone(nano):
    names = ["a", "base", "b", None, "a"]
    alone = {name: generate(*nano, ASK, adapter=name, logprobs=True, **OPTIONS) for name in names}
    together = batch_generate(*nano, [ASK] * 5, adapter=names, logprobs=True, **OPTIONS)
    assert [str(result) for result in together] == [SAID[name or "base"] for name in names]
    assert [result.adapter for result in together] == ["a", None, "b", None, "a"]
    assert [result.logprobs for result in together] == [alone[name].logprobs for name in names]


@pytest.mark.full
def test_one_name_is_for_all_prompts(nano):
    assert batch_generate(*nano, [ASK, ASK], adapter="b", **OPTIONS) == [SAID["b"]] * 2
    assert "".join(str(piece) for piece in stream_generate(*nano, ASK, adapter="b", **OPTIONS)) == SAID["b"]


@pytest.mark.full
def test_a_request_that_names_none_gets_the_default_and_base_gets_none(nano, monkeypatch):
    monkeypatch.setattr(nano[0].adapters, "default", "a")
    results = batch_generate(*nano, [ASK, ASK], adapter=[None, "base"], **OPTIONS)
    assert results == [SAID["a"], SAID["base"]]
    assert Conversation(*nano, **OPTIONS).send(ASK).text == SAID["a"]


@pytest.mark.parametrize("given", ["pirate", ["a", "pirate"]])
def test_an_adapter_that_is_not_loaded_is_refused_with_those_that_are(nano, given):
    with refused("adapter_unknown", "base, a, b, seeing", "pirate"):
        batch_generate(*nano, [ASK, ASK], adapter=given)
    with refused("adapter_unknown", "pirate"):
        Conversation(*nano, adapter="pirate")


@pytest.mark.parametrize("given", [3, "", ["a", ""], ["a", 3], [["a"]]])
def test_what_names_no_adapter_is_refused(nano, given):
    with refused("option_invalid", "adapter"):
        batch_generate(*nano, [ASK, ASK], adapter=given)


@pytest.mark.parametrize("given", [["a"], ["a", "b", "a"]])
def test_a_list_has_an_adapter_for_each_prompt(nano, given):
    with refused("option_invalid", "2 prompts", len(given)):
        batch_generate(*nano, [ASK, ASK], adapter=given)


def test_a_cache_goes_on_with_its_own_adapter_alone(nano):
    cache = nano[0].make_cache(adapter="a")
    first = generate(*nano, ASK, adapter="a", cache=cache, **OPTIONS)
    assert first == SAID["a"] and cache.adapters == ("a",) and cache.length > 0
    for other in ("b", "base", None):
        with refused("option_conflict", "adapter='a'"):
            generate(*nano, "And twice?", adapter=other, cache=cache, **OPTIONS)
    again = generate(*nano, "And twice?", adapter="a", cache=cache, **OPTIONS)
    assert again.finish_reason in ("stop", "length")


@pytest.mark.full
def test_drafts_change_no_answer_of_an_adapter(nano):
    options = OPTIONS | {"max_tokens": 24, "adapter": ["a", "b", "base"]}
    plain, drafted = (batch_generate(*nano, ["Count to ten."] * 3, mtp=mode, **options) for mode in ("off", "on"))
    assert [result.tokens for result in drafted] == [result.tokens for result in plain]
    assert sum(result.mtp.drafted for result in drafted) > 0


# --- conversations ----------------------------------------------------------------------------------------------------


def test_a_conversation_is_read_and_answered_by_its_adapter(nano):
    conversation = Conversation(*nano, adapter="a", **OPTIONS)
    assert conversation.send(ASK).text == SAID["a"] and conversation.cache.adapters == ("a",)
    turn = conversation.send("Add 10 to that.")
    assert turn.text == generate(*nano, messages=conversation.messages[:-1], adapter="a", **OPTIONS)
    assert turn.reused > 0
    with pytest.raises(TypeError):
        conversation.change(cache=nano[0].make_cache())


def test_a_conversation_that_takes_another_adapter_reads_anew(nano):
    conversation = Conversation(*nano, **OPTIONS)
    assert conversation.send(ASK).text == SAID["base"]
    conversation.change(adapter="b")
    assert conversation.entries == []
    turn = conversation.regenerate()
    assert (turn.text, turn.reused) == (SAID["b"], 0)
    conversation.change(adapter="base")
    turn = conversation.regenerate()
    assert turn.text == SAID["base"] and turn.reused > 0  # the library still has what it had read without an adapter
    with refused("adapter_unknown"):
        conversation.change(adapter="pirate")
    assert conversation.adapter == "" and conversation.options["adapter"] == "base"


def test_a_conversation_has_one_adapter(nano):
    with refused("option_invalid", "1 prompt", 2):
        Conversation(*nano, adapter=["a", "b"])


# --- images -----------------------------------------------------------------------------------------------------------


def test_adapters_that_leave_the_vision_encoder_alone_share_its_images(nano):
    encoded, options = [], OPTIONS | {"images": [SHAPES], "logprobs": True, "max_tokens": 2}
    names = ["base", "a", "seeing", "seeing"]
    results = batch_generate(
        *nano, ["What do you see?"] * 4, adapter=names, media_progress=lambda done, total: encoded.append(done),
        **options,
    )  # fmt: skip
    assert len(encoded) == 2  # once as the checkpoint sees, and once as the adapter does
    alone = [generate(*nano, "What do you see?", adapter=name, **options) for name in names]
    told = [[token.logprob for token in result.logprobs] for result in results]
    assert told == [[token.logprob for token in result.logprobs] for result in alone]
    assert told[2] == told[3] and len(set(map(tuple, told))) == 3


@pytest.mark.full
def test_an_adapter_of_the_vision_encoder_changes_what_is_seen(nano):
    prompt = request(*nano, "What do you see?", images=[SHAPES]).prompt
    (placed,) = prompt.media
    encoder, adapters = nano[0].vision.part, nano[0].adapters
    plain, other, seeing = (
        np.array(encoder.encode(placed.media, adapters.active([name]))) for name in ("", "a", "seeing")
    )
    assert (plain == other).all() and np.abs(plain - seeing).max() > 0.01
