"""A model over several ranks says what it says alone, by both splits."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapters.random_adapters import every_map, made
from distributed.ranks import Ranks, ranks

from mlx_qwen35 import Conversation, Processor, batch_generate, generate, load
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.kv_format import KVFormat
from mlx_qwen35.checkpoint.adapter_write import write_adapter
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.convert import convert
from mlx_qwen35.measure.score import likelihoods, score
from mlx_qwen35.model.model import Model

SPLITS = {"tensor": 2, "pipeline": [range(3), range(3, 8)]}
EACH = pytest.mark.parametrize("ranked", SPLITS, indirect=True)
ONE = pytest.mark.core(1)
SHORT = {"temp": 0, "max_tokens": 6, "enable_thinking": False}
SUM, WHO = "What is 34 + 58?", "Who are you?"
SHAPES = Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png"
WILD = {"temp": 1.8, "seed": 7, "max_tokens": 40, "presence_penalty": 0.5, "repetition_penalty": 1.2, "stop": ["z"]}


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


@pytest.fixture(scope="module")
def ranked(request):
    with ranks(resolve("nano"), SPLITS[request.param]) as found:
        yield found
        assert not found.between.reasons


def asked(text: str, **more) -> list[dict]:
    return [{"role": "user", "content": text, **more}]


def both(nano: tuple[Model, Processor], ranked: Ranks, *given, **options) -> tuple[str, str]:
    """The text of one process, and that of the ranks."""
    model, processor = nano
    return generate(model, processor, *given, **options).text, generate(ranked.model, processor, *given, **options).text


@ONE
@EACH
def test_logits_are_those_of_one_process(nano, ranked):
    tokens = mx.array([[*range(5, 40)], [*range(100, 135)]])
    alone, together = np.array(nano[0](tokens)), np.array(ranked.model(tokens))
    far = np.abs(alone - together).max()
    assert far == 0 if not ranked.between.tensor else far < 1e-5 * alone.std()


@pytest.mark.full
@EACH
def test_greedy_text_is_that_of_one_process(nano, ranked):
    alone, together = both(nano, ranked, asked(SUM), temp=0)
    assert alone == together == "92"


@ONE
@EACH
@pytest.mark.parametrize("mtp", ["off", "on"])
def test_sampled_text_with_penalties_and_stop_strings_is_that_of_one_process(nano, ranked, mtp):
    alone, together = both(nano, ranked, "Once", **WILD, mtp=mtp, ignore_chat_template=True)
    assert alone == together and len(alone) > 20


@pytest.mark.full
@EACH
def test_a_prompt_in_chunks_gives_the_text_of_one_process(nano, ranked):
    alone, together = both(nano, ranked, asked(SUM), **SHORT, prefill_step_size=5)
    assert alone == together


@ONE
@EACH
def test_rows_that_join_and_leave_give_the_texts_of_one_process(nano, ranked):
    prompts, (model, processor) = ["Once", "What is", SUM], nano
    options = {**WILD, "ignore_chat_template": True, "max_tokens": 16}
    alone, together = (batch_generate(m, processor, prompts, **options) for m in (model, ranked.model))
    assert [own.text for own in alone] == [own.text for own in together]
    assert len({len(own.tokens) for own in alone}) > 1, "rows end at different times"


@ONE
@EACH
@pytest.mark.parametrize("mtp", ["off", "on"])
def test_pictures_are_seen_as_by_one_process(nano, ranked, mtp):
    options = {"images": [SHAPES], "temp": 0, "mtp": mtp, "enable_thinking": False}
    alone, together = both(nano, ranked, "What do you see?", **options)
    assert alone == together == "A red circle and a blue square."


@pytest.mark.full
@EACH
@pytest.mark.parametrize("mtp", ["off", "on"])
def test_chunks_that_end_within_a_picture_give_the_text_of_one_process(nano, ranked, mtp):
    options = {"images": [SHAPES], "temp": 0, "mtp": mtp, "enable_thinking": False, "prefill_step_size": 5}
    given = len(ranked.between.given)
    alone, together = both(nano, ranked, "What do you see?", **options)
    assert alone == together == "A red circle and a blue square."
    passes = [order for order in ranked.between.given[given:] if order.name == "pass"]
    assert sum("rows" in order.arrays for order in passes) > 1, "one picture, in several passes"


@pytest.mark.full
@pytest.mark.parametrize("split", SPLITS)
def test_rescaled_positions_give_the_text_of_one_process(nano, split):
    """YaRN, whose factor for queries and keys every rank has."""
    alone, _ = load("nano", rope_scaling="yarn:4")
    with ranks(resolve("nano"), SPLITS[split], rope_scaling="yarn:4") as ranked:
        tokens = mx.array([[*range(5, 60)]])
        logits = [np.array(m(tokens)) for m in (alone, ranked.model, nano[0])]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5 * logits[0].std())
    assert np.abs(logits[2] - logits[0]).max() > 1e-2


@pytest.mark.full
@EACH
def test_a_conversation_that_is_edited_goes_on_as_in_one_process(nano, ranked):
    model, processor = nano
    talks = [Conversation(m, processor, **SHORT) for m in (model, ranked.model)]
    said = []
    for talk in talks:
        texts = [talk.send(SUM).text, talk.send(WHO).text, talk.edit("What is 3 + 4?").text, talk.send(WHO).text]
        said.append((texts, talk.library.counts.reused))
    assert said[0] == said[1] and said[0][1] > 0


@ONE
@EACH
def test_a_library_gives_the_ranks_what_was_read(nano, ranked):
    libraries, texts = [m.make_library() for m in (nano[0], ranked.model)], []
    for model, library in zip((nano[0], ranked.model), libraries, strict=True):
        own = [generate(model, nano[1], asked(SUM), **SHORT, library=library).text for _ in range(3)]
        texts.append(own)
    assert texts[0] == texts[1]
    assert libraries[0].counts.reused == libraries[1].counts.reused > 0


@pytest.mark.full
@EACH
def test_texts_are_scored_as_by_one_process(nano, ranked):
    for model in (nano[0], ranked.model):
        found = score(model, nano[1], "What is 34 + 58? It is 92.", prefill_step_size=4).logprobs
        options = [own.logprobs for own in likelihoods(model, [5, 6, 7], [[8], [9, 10]])]
        if model is nano[0]:
            alone = found, options
    np.testing.assert_allclose(found, alone[0], atol=1e-4)
    for own, other in zip(options, alone[1], strict=True):
        np.testing.assert_allclose(own, other, atol=1e-4)


def test_rejected_drafts_leave_every_rank_where_one_process_is(nano):
    """Drafts of which some are rejected: the other ranks go back too."""
    with ranks(resolve("nano"), 2) as ranked:
        model, processor = ranked.model, nano[1]
        options = {**WILD, "mtp": "on", "mtp_depth": 3, "ignore_chat_template": True}
        results = [generate(m, processor, "Once", **options) for m in (nano[0], model)]
        assert results[0].text == results[1].text
        assert any(note[0] == "rollback" for order in ranked.between.given for note in order.fields["noted"])


@pytest.mark.full
@pytest.mark.parametrize("split", [2, [range(1), range(1, 8)]], ids=["tensor", "pipeline"])
@pytest.mark.parametrize(("kv", "rotate"), [("8", False), ("8/4", False), ("8/4", True), ("4", False), ("4", True)])
def test_quantized_keys_give_the_text_of_one_process(nano, split, kv, rotate):
    alone, _ = load("nano", kv_bits=kv, kv_rotate=rotate)
    with ranks(resolve("nano"), split, kv=KVFormat.of(kv, rotate)) as ranked:
        options = {**WILD, "ignore_chat_template": True}
        texts = [generate(m, nano[1], "Once", **options).text for m in (alone, ranked.model)]
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """Two adapters of the text model."""
    folder = tmp_path_factory.mktemp("adapters")
    maps = every_map(open_checkpoint(resolve("nano")))
    for seed, name in enumerate("ab"):
        write_adapter(folder / name, made(maps, seed, strength=0.1).pairs)
    return {name: folder / name for name in "ab"}


@ONE
@pytest.mark.parametrize("split", [2, [range(5), range(5, 8)]], ids=["tensor", "pipeline"])
def test_rows_of_several_adapters_give_the_texts_of_one_process(nano, adapters, split):
    alone, _ = load("nano", adapter=adapters)
    with ranks(resolve("nano"), split, adapter=adapters) as ranked:
        logits: list[np.ndarray] = []
        options = {**WILD, "ignore_chat_template": True, "adapter": ["a", "base", "b"], "max_tokens": 6}
        texts = [
            [own.text for own in batch_generate(m, nano[1], ["Once"] * 3, **options)] for m in (alone, ranked.model)
        ]
        for model in (alone, ranked.model):
            cache = Cache.joined([model.make_cache(adapter=name) for name in ("a", "base", "b")])
            logits.append(np.array(model(mx.array([[5, 600, 7]] * 3), cache)))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5 * logits[0].std())
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


@pytest.mark.full
@pytest.mark.parametrize("split", SPLITS)
def test_a_packed_folder_gives_the_text_of_one_process(tmp_path, split):
    folder = convert("nano", tmp_path / "packed", recipe="4bit", verify=False)
    alone, processor = load(folder)
    with ranks(folder, SPLITS[split]) as ranked:
        options = {**WILD, "ignore_chat_template": True}
        texts = [generate(m, processor, "Once", **options).text for m in (alone, ranked.model)]
    assert texts[0] == texts[1]
