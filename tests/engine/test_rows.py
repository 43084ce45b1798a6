"""Rows join and leave: what a sequence gets depends on itself alone, and what leaves is gone."""

import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from engine.schedules import VOCABULARY, Case, alone, check, random_cases, together
from memory_use import active
from mtp.drafting import SMALL, load_small
from refusing import refused

from mlx_qwen35 import Conversation, InputError, batch_generate, generate, load
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.constraints.door import Door
from mlx_qwen35.engine.drafts.speculate import DraftPolicy
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import request
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.prompt import Prompt

PICTURE = "examples/pictures/shapes.png"


@pytest.fixture(scope="module")
def model(checkpoint_folder, tmp_path_factory) -> Model:
    return load_small(checkpoint_folder(SMALL), tmp_path_factory.mktemp("rows") / "model")


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def sequence(prompt, limit=20, seed=0, **options) -> Sequence:
    sampler = Sampler(Sampling(temp=1.0), seed, len(prompt), VOCABULARY, **options.pop("own", {}))
    return Sequence(Prompt(tuple(prompt), thinking=False), sampler, limit, prefill_step_size=64, **options)


def run(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


# --- I1: joins and leaves change no text ------------------------------------------------------------------------------


ORDINARY = (1, 2, 235)


@pytest.mark.parametrize(
    "seed", [seed if seed in ORDINARY else pytest.param(seed, marks=pytest.mark.full) for seed in range(304)]
)
def test_a_sequence_in_any_schedule_gets_what_it_gets_alone(model, seed):
    check(model, seed)


def test_texts_and_images_that_come_and_go_get_what_each_gets_alone(nano):
    asked = [
        ({"prompt": "What do you see?", "images": [PICTURE]}, 5),
        ({"prompt": "What is 34 + 58?", "mtp": "on", "mtp_depth": 3}, 0),
        ({"prompt": "What do you see?", "images": [PICTURE], "mtp": "on"}, 2),
        ({"prompt": "Who are you?", "temp": 0, "stop": ["mlx"]}, 9),
        ({"prompt": "What is 3 + 4?", "presence_penalty": 1.5, "min_p": 0.1}, 7),
        ({"prompt": "What is 3 + 4?", "temp": 4.0, "mtp": "on", "xtc_probability": 0.6}, 3),
    ]
    engine, requests = Engine(nano[0], interleave=True), []
    for step in range(10):
        for seed, (options, arrives) in enumerate(asked):
            if arrives == step:
                requests.append((request(*nano, seed=seed, max_tokens=30, **options), options, seed))
                engine.add(requests[-1][0])
        engine.step()
    run(engine)
    for made, options, seed in requests:
        assert made.result().tokens == generate(*nano, seed=seed, max_tokens=30, **options).tokens


def test_equal_prompts_of_a_batch_get_seeds_of_their_own(nano):
    question = "What is 34 + 58?"
    options = {"max_tokens": 12, "temp": 4.0}
    results = batch_generate(*nano, [question] * 3, seed=7, **options)
    assert [result.seed for result in results] == [7, 8, 9] and len({result.tokens for result in results}) == 3
    for row, result in enumerate(results):
        assert generate(*nano, question, seed=7 + row, **options).tokens == result.tokens
    again = batch_generate(*nano, [question] * 3, seed=[9, 7, 7], **options)
    assert [result.tokens for result in again] == [results[2].tokens, results[0].tokens, results[0].tokens]
    with refused("option_invalid", "3", "2"):
        batch_generate(*nano, [question] * 3, seed=[1, 2])


# --- I3, I4: what leaves is gone --------------------------------------------------------------------------------------


def test_no_array_is_left_of_rows_that_left(model):
    together(model, random_cases(1), interleave=True)  # what a model holds from its first use on
    before = active()
    engine = Engine(model, interleave=True)
    for seed in (20, 23):
        for case in random_cases(seed):
            engine.add(case.sequence())
            engine.step()
        run(engine)
    assert active() == before


@pytest.mark.core(1)
@pytest.mark.parametrize(
    "when",
    ["decoding", "drafting", *(pytest.param(name, marks=pytest.mark.full) for name in ("waiting", "prefilling"))],
)
def test_a_cancelled_sequence_frees_its_memory_within_one_step_and_the_other_goes_on(model, when):
    depth = 2 if when == "drafting" else 0
    drafts = DraftPolicy(depth, fixed=bool(depth))
    long, short = np.random.default_rng(0).integers(0, VOCABULARY, 700).tolist(), [1, 2, 3]
    run(engine := Engine(model))
    first, expected = sequence(short, 40, drafts=drafts), sequence(short, 40)
    engine.add(first)
    engine.step()
    before = active()
    second = sequence(long, 40, drafts=drafts)
    engine.add(second)
    for _ in range({"waiting": 0, "prefilling": 3, "decoding": 14, "drafting": 13}[when]):
        engine.step()
    assert bool(second.tokens) == (when in ("decoding", "drafting"))
    held = active() - before
    engine.cancel(second)
    engine.step()
    assert second.finish_reason == "interrupted"
    if when != "waiting":
        assert active() - before < held / 4
    run(engine)
    engine.add(expected)
    run(engine)
    assert first.tokens == expected.tokens and len(first.tokens) == 40


# --- I8: an error ends its own row ------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def failing(after: int):
    calls = iter(range(after))

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        if next(calls, None) is None:
            raise Broken
        return logits

    return processor


class Dead:
    """A constraint that allows nothing behind the third token."""

    def __init__(self) -> None:
        self.count = 0

    def mask(self) -> np.ndarray:
        return np.full(VOCABULARY, self.count < 3)

    def accept(self, token: int) -> None:
        self.count += 1

    def rollback(self, count: int) -> None:
        self.count -= count


class Listing(Dead):
    def mask(self) -> list[int]:
        return [19, 20]


@pytest.mark.core(4)
@pytest.mark.parametrize("depth", [0, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("own", "kind"),
    [
        ({"processors": [failing(0)]}, Broken),
        ({"processors": [failing(4)]}, Broken),
        ({"choose": lambda logprobs: mx.array([10**6])}, InputError),
        ({"choose": lambda logprobs: logprobs}, InputError),
        ({"choose": lambda logprobs: mx.array([1.5])}, InputError),
        ({"choose": lambda logprobs: 7}, InputError),
        ({"door": Door(VOCABULARY, everywhere=Dead())}, InputError),
        ({"door": Door(VOCABULARY, everywhere=Listing())}, InputError),
        ({"processors": [lambda tokens, logits: logits[:, :5]]}, InputError),
        ({"processors": [lambda tokens, logits: None]}, InputError),
    ],
    ids=["processor at once", "processor later", "token that is none", "choice of another shape", "a float", "a number",
         "nothing allowed", "a mask of numbers", "fewer logits", "no logits"],
)
def test_an_error_of_a_row_ends_that_row_alone(model, own, kind, depth):
    cases = [case for case in random_cases(3) if case.leaves is None][:2]
    engine, others = Engine(model), [case.sequence() for case in cases]
    bad = sequence([5, 6, 7], own=own, drafts=DraftPolicy(depth, fixed=bool(depth)))
    engine.add(*others, bad)
    run(engine)
    assert isinstance(bad.error, kind) and bad.result().finish_reason == "error" and bad.result().error is bad.error
    for case, other in zip(cases, others, strict=True):
        assert other.error is None and other.tokens == alone(model, case)


class Sparse(Dead):
    """A constraint with one way, which forbids nothing on it: from any other token on nothing is allowed."""

    def __init__(self, way: list[int], failing: bool) -> None:
        self.tokens, self.way, self.failing = [], way, failing

    def mask(self) -> np.ndarray:
        on = self.tokens == self.way[: len(self.tokens)]
        if self.failing and not on:
            raise Broken
        return np.full(VOCABULARY, on)

    def accept(self, token: int) -> None:
        self.tokens.append(token)

    def rollback(self, count: int) -> None:
        del self.tokens[len(self.tokens) - count :]


@pytest.mark.parametrize("failing", [False, True])
def test_a_dead_end_behind_a_draft_that_is_not_taken_changes_nothing(model, failing):
    """The way is the answer itself, which the drafts of a random head leave at once."""

    def answer(depth: int, door: Door | None) -> Sequence:
        sampler = Sampler(Sampling(temp=0), 0, 3, VOCABULARY, door=door)
        drafts = DraftPolicy(depth, fixed=bool(depth))
        row = Sequence(Prompt((5, 6, 7), thinking=False), sampler, 8, prefill_step_size=64, drafts=drafts)
        engine = Engine(model)
        engine.add(row)
        run(engine)
        return row

    way = answer(0, None).tokens
    for depth in (0, 3):
        row = answer(depth, Door(VOCABULARY, everywhere=Sparse(way, failing)))
        assert (row.tokens, row.error) == (way, None)
    assert row.drafts.drafted > row.drafts.accepted, "a guess left the way"


class Interrupting(Dead):
    """A constraint in whose n-th mask Ctrl-C comes."""

    def __init__(self, masks: int) -> None:
        self.masks = masks

    def mask(self) -> np.ndarray:
        self.masks -= 1
        if not self.masks:
            raise KeyboardInterrupt
        return np.full(VOCABULARY, True)

    def accept(self, token: int) -> None:
        pass

    def rollback(self, count: int) -> None:
        pass


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("masks", [5, pytest.param(2, marks=pytest.mark.full)])
def test_ctrl_c_in_a_mask_ends_the_row_with_what_it_has(model, masks, depth):
    door = Door(VOCABULARY, everywhere=Interrupting(masks))
    row = sequence([5, 6, 7], own={"door": door}, drafts=DraftPolicy(depth, fixed=bool(depth)))
    waiting, engine = sequence([1, 2]), Engine(model, interleave=True)
    engine.add(row)
    with pytest.raises(KeyboardInterrupt):
        while not engine.idle:
            engine.step()
    assert row.finish_reason == "interrupted" and row.tokens and engine.idle
    engine.add(waiting)
    run(engine)
    assert waiting.error is None and len(waiting.tokens) == 20


def test_an_error_in_a_pass_of_all_rows_ends_them_and_the_engine_goes_on(model, monkeypatch):
    engine, rows = Engine(model), [sequence([1, 2, 3]), sequence([4, 5])]
    caches = [model.make_cache() for _ in rows]
    for row, cache in zip(rows, caches, strict=True):
        row.cache = cache
    engine.add(*rows)
    for _ in range(5):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(Model, "logits", lambda self, *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert engine.idle and [row.finish_reason for row in rows] == ["interrupted"] * 2
    for row, cache, prompt in zip(rows, caches, ([1, 2, 3], [4, 5]), strict=True):
        read = model.make_cache()
        mx.eval(model.hidden(mx.array([[*prompt, *row.tokens]]), read))
        assert cache.row_lengths == read.row_lengths
    after = sequence([1, 2, 3])
    engine.add(after)
    run(engine)
    assert after.tokens[: len(rows[0].tokens)] == rows[0].tokens


@pytest.mark.parametrize("seed", [2, pytest.param(0, marks=pytest.mark.full), pytest.param(6, marks=pytest.mark.full)])
def test_each_step_may_be_taken_in_another_thread(model, seed):
    """With rows that join, leave and are cancelled, with drafts and without, with penalties and constraints."""
    expected = [sequence.tokens for sequence in together(model, random_cases(seed), interleave=True)]

    class Elsewhere(Engine):
        def step(self) -> list[Sequence]:
            found: list[list[Sequence]] = []
            thread = threading.Thread(target=lambda: found.append(Engine.step(self)))
            thread.start()
            thread.join()
            return found[0]

    told = together(model, random_cases(seed), interleave=True, engine=Elsewhere)
    assert [sequence.tokens for sequence in told] == expected
    assert all(sequence.error is None for sequence in told)


def test_a_sequence_runs_once(model):
    engine, once = Engine(model), sequence([1, 2, 3], 3)
    engine.add(once)
    run(engine)
    with refused("generation_spent"):
        engine.add(once)


def test_a_sequence_that_is_cancelled_by_its_own_progress_leaves_the_next_alone(model):
    engine = Engine(model)
    first, second, alone_ = sequence([1] * 100), sequence([4, 5]), sequence([4, 5])
    first.progress = lambda tokens: engine.cancel(first)
    engine.add(first, second)
    run(engine)
    engine.add(alone_)
    run(engine)
    assert first.tokens == [] and first.finish_reason == "interrupted" and second.tokens == alone_.tokens


def test_a_finished_row_has_left_while_its_neighbours_have_drafted_tokens_to_come(model):
    """So that its caller may go on with its cache at once."""
    cache, drafts = model.make_cache(), DraftPolicy(3, fixed=True)
    short, long = sequence([1, 2, 3], 2, cache=cache, drafts=drafts), sequence([1, 2, 3], 30, drafts=drafts)
    engine = Engine(model)
    engine.add(short, long)
    while not short.finished:
        engine.step()
    assert cache.row_lengths == [4] and not long.finished
    run(engine)
    assert long.tokens[:2] == short.tokens


# --- the caller's own functions ---------------------------------------------------------------------------------------


def test_a_constraint_holds_and_changes_no_text_with_drafts(model):
    cases = [case for seed in range(40) for case in random_cases(seed) if case.constrained and case.depth]
    for case in cases[:6]:
        plain = Case(**{**case.__dict__, "depth": 0})
        tokens = alone(model, case)
        assert tokens == alone(model, plain)
        assert all(token % 2 == place % 2 for place, token in enumerate(tokens))


def test_mlx_lm_s_samplers_and_processors_work(nano):
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    question = "What is 34 + 58?"
    greedy = generate(*nano, question, temp=0, max_tokens=20)
    assert generate(*nano, question, sampler=make_sampler(temp=0.0), max_tokens=20).tokens == greedy.tokens
    seen = []

    def spy(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append((tokens.tolist(), logits.shape))
        return logits

    told = generate(*nano, question, temp=0, max_tokens=20, logits_processors=[spy])
    assert told.tokens == greedy.tokens and told.mtp.drafted == 0
    first = seen[0][0]
    assert [tokens for tokens, _ in seen] == [first + list(told.tokens[:n]) for n in range(len(told.tokens))]
    assert {shape for _, shape in seen} == {(1, nano[0].config.vocab_size)}
    banned = greedy.tokens[0]
    bias = make_logits_processors(logit_bias={banned: -1e9})
    assert banned not in generate(*nano, question, temp=0, max_tokens=20, logits_processors=bias).tokens


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": lambda x: x, "temp": 0.5}, {"sampler": lambda x: x, "mtp": "on"},
        {"logits_processors": [lambda t, x: x], "mtp_depth": 2},
    ],
)  # fmt: skip
def test_options_without_effect_beside_the_caller_s_functions_are_refused(nano, options):
    with refused("option_conflict"):
        generate(*nano, "Hello", **options)


@pytest.mark.parametrize(
    "options", [{"sampler": 3}, {"logits_processors": [3]}, {"logits_processors": 3}, {"constraint": 3}, {"seed": [-1]}]
)
def test_functions_of_another_kind_are_refused(nano, options):
    with refused("option_invalid", next(iter(options))):
        generate(*nano, "Hello", **options)


@pytest.mark.parametrize("swapped", [lambda m, p: (p, m), lambda m, p: ("nano", p), lambda m, p: (m, None)])
def test_a_model_and_a_processor_that_are_none_are_refused(nano, swapped):
    for use in (lambda *two: generate(*two, "Hello"), Conversation):
        with refused("option_invalid"):
            use(*swapped(*nano))


def test_a_cache_of_no_rows_and_a_snapshot_that_is_none_are_refused(model):
    for batch in (0, -1, "2"):
        with refused("option_invalid", "batch"):
            model.make_cache(batch)
    for snapshot in (None, model.make_cache()):
        with refused("option_invalid"):
            model.make_cache().restore(snapshot)


def test_a_callback_may_use_what_another_thread_runs(nano):
    """One lock for all: with one more for each conversation the two threads would wait for each other."""
    mine, other = (Conversation(*nano, seed=1, enable_thinking=False, max_tokens=12) for _ in range(2))
    turn, began = other.send("Who are you?"), threading.Event()
    thread = threading.Thread(target=lambda: (began.set(), [None for _ in turn]), daemon=True)

    def cancel(done: int, total: int) -> None:
        if not began.is_set():
            thread.start()
        began.wait()
        time.sleep(0.05)  # so that the other waits inside its turn
        turn.cancel()

    assert mine.send("What is 3 + 4?", cancel).text
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_constraint_belongs_to_one_prompt(nano):
    with refused("option_conflict"):
        batch_generate(*nano, ["a", "b"], constraint=Dead())


# --- caches -----------------------------------------------------------------------------------------------------------


def test_rows_of_a_batch_go_on_with_caches_of_their_own(nano):
    model, processor = nano
    caches, singles = [model.make_cache() for _ in range(2)], [model.make_cache() for _ in range(2)]
    for questions in (["What is 34 + 58?", "Who are you?"], ["Who are you?", "What is 3 + 4?"]):
        together_ = batch_generate(model, processor, questions, cache=caches, seed=[1, 2], max_tokens=20)
        for row, question in enumerate(questions):
            one = generate(model, processor, question, cache=singles[row], seed=row + 1, max_tokens=20)
            assert together_[row].tokens == one.tokens
            assert caches[row].row_lengths == singles[row].row_lengths


@pytest.mark.parametrize("mtp", ["off", "on"])
def test_a_cache_goes_on_as_one_prompt_of_all_its_tokens(nano, mtp):
    """At the positions, and with the noise, of the whole."""
    model, processor = nano
    options, cache = {"seed": 3, "temp": 3.0, "mtp": mtp}, model.make_cache()
    read: list[int] = []
    for tokens, most in (([5, 6, 7], 6), ([8, 9], 5), ([10], 4)):
        answer = generate(model, processor, tokens, cache=cache, max_tokens=most, **options).tokens
        assert answer == generate(model, processor, [*read, *tokens], max_tokens=most, **options).tokens
        read += [*tokens, *answer[: cache.length - len(read) - len(tokens)]]
        assert cache.length == len(read)


def test_a_part_in_use_is_not_unloaded_by_another_generation(nano):
    from mlx_qwen35 import stream_generate

    model, processor = nano
    options = {"prompt": "What is 34 + 58?", "seed": 1, "mtp": "on"}
    expected = [str(piece) for piece in stream_generate(model, processor, **options)]
    stream = stream_generate(model, processor, **options)
    told = [str(next(stream))]
    generate(model, processor, "Who are you?", mtp="off", max_tokens=3)
    assert model.mtp.loaded and len(model.mtp.users) == 1
    told += map(str, stream)
    assert told == expected and not model.mtp.users
    generate(model, processor, "Who are you?", mtp="off", max_tokens=3)
    assert not model.mtp.loaded


def test_the_vision_encoder_stays_while_a_prompt_with_an_image_waits(nano):
    model, processor = nano
    engine = Engine(model)
    for size in (4096, 9216):
        engine.add(request(model, processor, "What?", images=[PICTURE], max_pixels=size, max_tokens=2))
    loaded = []
    while not engine.idle:
        engine.step()
        loaded.append((len(engine.waiting), model.vision.loaded))
    assert (1, True) in loaded and loaded[-1] == (0, False) and not model.vision.users


def test_caches_that_do_not_fit_the_prompts_are_refused(nano):
    model, processor = nano
    one = model.make_cache()
    for cache in (one, [one], [one, one], [one, model.make_cache(2)]):
        with refused("cache_batch_mismatch"):
            batch_generate(model, processor, ["a", "b"], cache=cache)


def test_two_streams_on_one_cache_do_not_harm_each_other(nano):
    from mlx_qwen35 import stream_generate

    model, processor = nano
    cache = model.make_cache()
    generate(model, processor, "Who are you?", cache=cache, seed=0, max_tokens=8)

    def stream(seed: int, own: Cache):
        return stream_generate(model, processor, "What is 34 + 58?", cache=own, seed=seed, max_tokens=20)

    expected = [[str(p) for p in stream(seed, cache.copy())] for seed in range(2)]
    streams, told = [stream(seed, cache) for seed in range(2)], [[], []]
    for _ in range(40):
        for own, text in zip(streams, told, strict=True):
            if (piece := next(own, None)) is not None:
                text.append(str(piece))
    assert told == expected
