"""Positions and whole prompts with images and clips against transformers: embeddings, logits, and what is drawn."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from parity.cases import Case
from parity.vision_cases import CASES, GREEDY, ODD, PROMPTS, TINY, TURN, Scene, scenes

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.generation import encode_media
from mlx_qwen35.engine.loop import decode
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
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
            (encoded[key],) = encode_media(model_of(scene.case), [scene.prompt])
        return encoded[key]

    return row


# --- positions -------------------------------------------------------------------------------------------------------


@every_scene
def test_positions_equal_transformers(scene, reference):
    ours = positions(scene.length, scene.prompt.placeholders)
    assert reference(scene.case).error(f"{scene.name} positions", ours) == 0


@every_scene
def test_the_next_position_is_transformers_delta_plus_the_length(scene, model_of, row_of, reference):
    model = model_of(scene.case)
    cache = model.make_cache()
    prefill(model, cache, [row_of(scene)], 1000)
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
        self.model, self.config, self.dtype = model, model.config, model.dtype
        self.embedded: list[mx.array] = []
        self.hiddens: list[mx.array] = []

    def hidden(
        self, tokens, cache, lengths=None, visual=None, places=None, at=None, pace=None, stepwise=False
    ) -> mx.array:
        self.embedded.append(self.model.embed(tokens, visual))
        self.hiddens.append(self.model.hidden(tokens, cache, lengths, visual, places))
        return self.hiddens[-1] if at is None else mx.take_along_axis(self.hiddens[-1], at[:, None, None], axis=1)

    def logits(self, hidden: mx.array) -> mx.array:
        return self.model.logits(hidden)

    def all_logits(self) -> mx.array:
        """(T, V) of the only row."""
        return self.model.logits(mx.concatenate(self.hiddens, axis=1)[0])


def draw(model, cache: Cache, hidden: mx.array, count: int = GREEDY) -> list[list[int]]:
    """`count` greedy tokens of each row, those of transformers where the model is right."""
    rows = len(hidden)
    sampler = Sampler(Sampling(temp=0), [0] * rows, [0] * rows, 1024)
    return list(zip(*decode(model, cache, hidden, sampler, [count] * rows, ()), strict=True))


def answer(model: Model, rows: list[PromptRow], step: int) -> tuple[Recorder, list[int]]:
    """Read the prompts one after the other into one cache, then draw."""
    recorder, cache = Recorder(model), model.make_cache()
    for row in rows:
        hidden = prefill(recorder, cache, [row], step)
    return recorder, draw(recorder, cache, hidden)[0]


@every_scene
def test_merged_embeddings_equal_transformers(scene, model_of, row_of, reference):
    """Read in chunks of 7, which end inside images."""
    recorder = Recorder(model_of(scene.case))
    prefill(recorder, recorder.model.make_cache(), [row_of(scene)], 7)
    embedded = mx.concatenate(recorder.embedded, axis=1)[0]
    assert len(embedded) == scene.length
    assert reference(scene.case).error(f"{scene.name} embeddings", embedded) < EMBEDDINGS


chunked = [
    pytest.param(scene, step, id=f"{scene.case.name}-{scene.name}-{step}")
    for scene in all_scenes
    for step in (1, 7, 64, 1000)
    if step < scene.length or step == 1000  # the whole prompt
]


@pytest.mark.parametrize(("scene", "step"), chunked)
def test_logits_and_16_greedy_tokens_equal_transformers(scene, step, model_of, row_of, reference):
    recorder, drawn = answer(model_of(scene.case), [row_of(scene)], step)
    assert reference(scene.case).error(f"{scene.name} greedy", np.array([drawn])) == 0
    logits = recorder.all_logits()
    assert len(logits) == scene.length + GREEDY - 1
    assert reference(scene.case).error(f"{scene.name} logits", logits) < TOLERANCE


@pytest.mark.parametrize("step", [7, 1000])
def test_a_later_turn_with_new_images_equals_the_whole_prompt(step, model_of, reference):
    prompt = Scene(TINY, "turns").prompt
    first, model = Prompt(prompt.tokens[:TURN], False, prompt.media[:1]), model_of(TINY)
    recorder, drawn = answer(model, [encode_media(model, [turn])[0] for turn in (first, prompt.after(TURN))], step)
    assert reference(TINY).error("turns greedy", np.array([drawn])) == 0
    assert reference(TINY).error("turns logits", recorder.all_logits()) < TOLERANCE


def test_text_that_comes_right_behind_an_image_in_another_call_equals_the_whole_prompt(model_of, row_of, reference):
    """The last position of an image, which the text goes on behind, is on the axis of its longer side."""
    whole = row_of(Scene(TINY, "image"))
    stop = whole.placeholders[0].stop
    rows = [whole._replace(tokens=whole.tokens[:stop]), PromptRow(whole.tokens[stop:])]
    recorder, drawn = answer(model_of(TINY), rows, 1000)
    assert reference(TINY).error("image greedy", np.array([drawn])) == 0
    assert reference(TINY).error("image logits", recorder.all_logits()) < TOLERANCE


@pytest.mark.parametrize(("case", "step"), [(TINY, 7), (ODD, 1000)], ids=lambda x: getattr(x, "name", x))
def test_rows_with_different_images_and_none_equal_single_runs(case, step, model_of, row_of, reference):
    model = model_of(case)
    names = ("mix", "text", "three", "clip", "image") if case is TINY else ("mix", "image")
    short = Prompt(Scene(case, "text").prompt.tokens[:3], False)
    rows = encode_media(model, [*(Scene(case, name).prompt for name in names), short])
    cache = model.make_cache(len(rows))
    last = prefill(model, cache, rows, step)
    for row, single in enumerate([*(row_of(Scene(case, name)) for name in names), PromptRow(short.tokens)]):
        own = model.make_cache()
        alone = prefill(model, own, [single], 1000)
        assert mx.abs(last[row] - alone[0]).max().item() < TOLERANCE
        assert cache.next_positions[row] == own.next_positions[0]
    together = draw(model, cache, last)
    for name, drawn in zip(names, together, strict=False):
        assert reference(case).error(f"{name} greedy", np.array([drawn])) == 0, name


def test_a_batch_whose_later_turn_shows_images_to_some_rows_equals_single_runs(model_of, row_of):
    model = model_of(TINY)
    rows = [[row_of(Scene(TINY, name)) for name in names] for names in (("image", "text"), ("text", "later"))]
    cache = model.make_cache(2)
    for turn in zip(*rows, strict=True):
        last = prefill(model, cache, turn, 16)
    for row, (first, second) in enumerate(rows):
        own = model.make_cache()
        prefill(model, own, [first], 1000)
        alone = prefill(model, own, [second], 1000)
        assert mx.abs(last[row] - alone[0]).max().item() < TOLERANCE
        assert cache.next_positions[row] == own.next_positions[0]
