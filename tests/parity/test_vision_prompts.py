"""Positions and whole prompts with images and clips against transformers: embeddings, logits, and what is drawn."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from parity.cases import Case
from parity.vision_cases import CASES, GREEDY, ODD, PROMPTS, TINY, TURN, Scene, scenes

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.media import encode_media
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.positions import positions
from mlx_qwen35.prompt.prompt import Prompt

# Of embeddings of images, with a standard deviation of 3; and of logits, 0.2 to 0.3, as in test_logits.py.
EMBEDDINGS = 3e-5
TOLERANCE = 1e-4

all_scenes = [scene for case in CASES for scene in scenes(case)]
every_scene = pytest.mark.parametrize("scene", all_scenes, ids=lambda scene: f"{scene.case.name}-{scene.name}")


@pytest.fixture(scope="module")
def model_of(parity_model) -> Callable[[Case], Model]:
    """Our float32 model of a case, whose tower stays in memory."""

    def model(case: Case) -> Model:
        parity_model(case).vision.keep = True
        return parity_model(case)

    return model


@pytest.fixture(scope="module")
def row_of(model_of) -> Callable[[Scene], PromptRow]:
    """A scene's prompt with its images encoded, once."""
    encoded: dict[tuple[str, str], PromptRow] = {}

    def row(scene: Scene) -> PromptRow:
        key = scene.case.name, scene.name
        if key not in encoded:
            encoded[key] = encode_media(model_of(scene.case), scene.prompt)
        return encoded[key]

    return row


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.core(3)
@every_scene
def test_positions_equal_transformers(scene, reference):
    ours = positions(scene.length, scene.prompt.placeholders)
    assert reference(scene.case).error(f"{scene.name} positions", ours) == 0


@pytest.mark.core(3)
@every_scene
def test_the_next_position_is_transformers_delta_plus_the_length(scene, model_of, row_of, reference):
    model = model_of(scene.case)
    cache = model.make_cache()
    prefill(model, cache, row_of(scene), 1000)
    (following,) = cache.next_positions
    delta = following - scene.length
    assert reference(scene.case).error(f"{scene.name} delta", np.array([[delta]])) == 0
    table = positions(scene.length, scene.prompt.placeholders)
    assert following == table.max() + 1


def test_positions_of_a_later_turn_go_on_from_the_first():
    prompt = Scene(TINY, "turns").prompt
    whole = positions(len(prompt.tokens), prompt.placeholders)
    later = prompt.after(TURN)
    assert len(later.placeholders) == 3 and len(prompt.placeholders) == 4
    table = positions(len(later.tokens), later.placeholders, whole[:, :TURN].max() + 1)
    np.testing.assert_array_equal(table, whole[:, TURN:])


def test_golden_files_keep_every_token_of_the_prompts():
    assert max(scene.length for scene in all_scenes) + GREEDY < 96
    assert {scene.name for scene in all_scenes} == set(PROMPTS)


# --- whole prompts ---------------------------------------------------------------------------------------------------


class Recorder:
    """A model that keeps what it embedded and put out, for every column of every row that it read."""

    def __init__(self, model: Model):
        self.model = model
        self.embedded: list[mx.array] = []
        self.hiddens: list[mx.array] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden(
        self, tokens, cache, lengths=None, visual=None, places=None, at=None, pace=None, stepwise=False
    ) -> mx.array:
        self.embedded.append(self.model.embed(tokens, visual))
        self.hiddens.append(self.model.hidden(tokens, cache, lengths, visual, places))
        return self.hiddens[-1] if at is None else mx.take_along_axis(self.hiddens[-1], at[:, None, None], axis=1)

    def all_logits(self) -> mx.array:
        """(T, V) of the only row."""
        return self.model.logits(mx.concatenate(self.hiddens, axis=1)[0])


def draw(
    model: Model | Recorder, prompts: list[Prompt], step: int, caches: list[Cache] | None = None, count: int = GREEDY
) -> list[list[int]]:
    """`count` greedy tokens of each prompt, together; those of transformers where the model is right."""
    sequences = []
    for prompt, cache in zip(prompts, caches or [None] * len(prompts), strict=True):
        sampler = Sampler(Sampling(temp=0), 0, 0, 1024)
        sequences.append(Sequence(prompt, sampler, count, prefill_step_size=step, cache=cache))
    engine = Engine(model)
    engine.add(*sequences)
    while not engine.idle:
        engine.step()
    return [sequence.tokens for sequence in sequences]


def answer(model: Model, before: list[PromptRow], prompt: Prompt, step: int) -> tuple[Recorder, list[int]]:
    """Read what comes before and a prompt one after the other into one cache, then draw."""
    recorder, cache = Recorder(model), model.make_cache()
    for row in before:
        prefill(recorder, cache, row, step)
    return recorder, draw(recorder, [prompt], step, [cache])[0]


@pytest.mark.core(3)
@every_scene
def test_merged_embeddings_equal_transformers(scene, model_of, row_of, reference):
    """Read in chunks of 7, which end inside images."""
    recorder = Recorder(model_of(scene.case))
    prefill(recorder, recorder.make_cache(), row_of(scene), 7)
    embedded = mx.concatenate(recorder.embedded, axis=1)[0]
    assert len(embedded) == scene.length
    assert reference(scene.case).error(f"{scene.name} embeddings", embedded) < EMBEDDINGS


chunked = [
    pytest.param(scene, step, id=f"{scene.case.name}-{scene.name}-{step}")
    for scene in all_scenes
    for step in (1, 7, 64, 1000)
    if step < scene.length or step == 1000  # the whole prompt
]


@pytest.mark.core(4)
@pytest.mark.parametrize(("scene", "step"), chunked)
def test_logits_and_16_greedy_tokens_equal_transformers(scene, step, model_of, reference):
    recorder, drawn = answer(model_of(scene.case), [], scene.prompt, step)
    assert reference(scene.case).error(f"{scene.name} greedy", np.array([drawn])) == 0
    logits = recorder.all_logits()
    assert len(logits) == scene.length + GREEDY - 1
    assert reference(scene.case).error(f"{scene.name} logits", logits) < TOLERANCE


@pytest.mark.parametrize("step", [7, 1000])
def test_a_later_turn_with_new_images_equals_the_whole_prompt(step, model_of, reference):
    prompt = Scene(TINY, "turns").prompt
    first, model = Prompt(prompt.tokens[:TURN], False, prompt.media[:1]), model_of(TINY)
    recorder, drawn = answer(model, [encode_media(model, first)], prompt.after(TURN), step)
    assert reference(TINY).error("turns greedy", np.array([drawn])) == 0
    assert reference(TINY).error("turns logits", recorder.all_logits()) < TOLERANCE


def test_text_that_comes_right_behind_an_image_in_another_call_equals_the_whole_prompt(model_of, row_of, reference):
    """The last position of an image, which the text goes on behind, is on the axis of its longer side."""
    whole = row_of(Scene(TINY, "image"))
    stop = whole.placeholders[0].stop
    before, rest = whole._replace(tokens=whole.tokens[:stop]), Prompt(tuple(whole.tokens[stop:]), False)
    recorder, drawn = answer(model_of(TINY), [before], rest, 1000)
    assert reference(TINY).error("image greedy", np.array([drawn])) == 0
    assert reference(TINY).error("image logits", recorder.all_logits()) < TOLERANCE


@pytest.mark.core(1)
@pytest.mark.parametrize(("case", "step"), [(TINY, 7), (ODD, 1000)], ids=lambda x: getattr(x, "name", x))
def test_rows_with_different_images_and_none_equal_single_runs(case, step, model_of, row_of, reference):
    model = model_of(case)
    names = ("mix", "text", "three", "clip", "image") if case is TINY else ("mix", "image")
    short = Prompt(Scene(case, "text").prompt.tokens[:3], False)
    together = draw(model, [*(Scene(case, name).prompt for name in names), short], step)
    for name, drawn in zip(names, together, strict=False):
        assert reference(case).error(f"{name} greedy", np.array([drawn])) == 0, name
    rows, alone, caches = [*(row_of(Scene(case, name)) for name in names), PromptRow(short.tokens)], [], []
    for row, drawn in zip(rows, together, strict=True):
        caches.append(model.make_cache())
        prefill(model, caches[-1], row, step)
        whole = model.make_cache()
        prefill(model, whole, row, 1000)
        alone.append((model(mx.array([drawn[:1]]), whole), whole.next_positions[0]))
    joined = Cache.joined(caches)
    logits = model(mx.array([drawn[:1] for drawn in together]), joined)
    for row, (own, following) in enumerate(alone):
        assert mx.abs(logits[row] - own[0]).max().item() < TOLERANCE
        assert joined.next_positions[row] == following


@pytest.mark.full
def test_a_batch_whose_later_turn_shows_images_to_some_rows_equals_single_runs(model_of, row_of):
    model = model_of(TINY)
    turns = [[Scene(TINY, name) for name in names] for names in (("image", "text"), ("text", "later"))]
    caches = [model.make_cache() for _ in range(4)]
    for cache, (first, _) in zip(caches, turns * 2, strict=True):
        prefill(model, cache, row_of(first), 16)
    together = draw(model, [second.prompt for _, second in turns], 16, caches[:2])
    for row, (_, second) in enumerate(turns):
        assert draw(model, [second.prompt], 1000, [caches[2 + row]]) == [together[row]]
        assert caches[row].next_positions == caches[2 + row].next_positions
        for name, array in caches[row].arrays().items():
            assert mx.abs(array - caches[2 + row].arrays()[name]).max().item() < TOLERANCE, name
