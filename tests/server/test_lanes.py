"""Invariants of answers that run together: their texts, their memory, their ends, and how long others wait."""

import functools
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from memory_use import active
from server.lanes import ENDLESS, QUESTION, Bench, Heard, nano

from mlx_qwen35 import generate
from mlx_qwen35.engine.engine import CHUNK_SECONDS, Engine
from mlx_qwen35.engine.prepared import Prepared
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.server.errors import ApiError

PICTURES = ["examples/pictures/shapes.png"]
LONG = [7, 9, 11] * 100  # tokens
CASES: tuple[tuple[Any, dict[str, Any]], ...] = (
    (QUESTION, {"temp": 0, "mtp": "off"}),
    (QUESTION, {"temp": 1.0, "mtp": "off", "logprobs": True}),
    ("Who are you?", {"temp": 1.0, "mtp": "on"}),
    ("Who are you?", {"temp": 0, "mtp": "on", "mtp_depth": 3}),
    ([5] * 35, {"temp": 1.0, "presence_penalty": 1.5, "repetition_penalty": 1.2, "frequency_penalty": 0.3}),
    ([6] * 40, {"temp": 0.8, "top_k": 20, "min_p": 0.01, "mtp": "on"}),
    ("What is there?", {"temp": 0, "mtp": "off", "images": PICTURES}),
    ("What is there?", {"temp": 1.0, "mtp": "on", "images": PICTURES}),
    (QUESTION, {"temp": 1.0, "mtp": "off", "regex": "[ab]{5}c*", "enable_thinking": False}),
    (QUESTION, {"temp": 1.0, "mtp": "on", "json_schema": {"type": "integer"}, "enable_thinking": False}),
    (QUESTION, {"temp": 0, "mtp": "off", "thinking_budget": 3, "max_tokens": 290}),
)


def settings(case: int) -> tuple[Any, dict[str, Any]]:
    prompt, options = CASES[case]
    return prompt, {"max_tokens": 10, "seed": case, **options}


@functools.cache
def alone(case: int) -> Result:
    prompt, options = settings(case)
    return generate(*nano(), prompt, **options)


def check(heard: Heard, expected: Result) -> None:
    """Its answer is the one it has alone, or the beginning of that where it was cancelled; its end was told once."""
    result = heard.result
    assert result.error is None
    assert result.tokens == expected.tokens[: len(result.tokens)]
    if result.finish_reason != "interrupted":
        assert (result.tokens, result.text, heard.text) == (expected.tokens, expected.text, expected.text)
        assert result.finish_reason == expected.finish_reason
    assert heard.events[-1].result is result
    given = [own for event in heard.events for own in event.logprobs]
    assert given == list(result.logprobs or ())


# --- I1, I7: the text is the same whatever joins or leaves ---


def schedule(seed: int) -> None:
    """Random answers that join, leave and are cancelled."""
    rng, bench = random.Random(seed), Bench(rows=4)
    arrivals = sorted(rng.randrange(25) for _ in range(rng.randrange(3, 8)))
    asked: list[tuple[Heard, int, int | None]] = []
    for turn in range(4000):
        for _ in range(arrivals.count(turn)):
            case = rng.randrange(len(CASES))
            prompt, options = settings(case)
            leaves = turn + rng.randrange(1, 15) if rng.random() < 0.25 else None
            asked.append((bench.ask(prompt, **options)[0], case, leaves))
        for heard, _, leaves in asked:
            if leaves == turn:
                bench.lanes.drop(heard.lane.owner)
        bench.lanes.turn()
        if bench.lanes.idle and turn > max(arrivals):
            break
    assert len(asked) == len(arrivals)
    for heard, case, _ in asked:
        check(heard, alone(case))


def test_a_text_is_the_same_in_random_schedules() -> None:
    for seed in range(2):
        schedule(seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 300))
def test_a_text_is_the_same_in_more_random_schedules(seed: int) -> None:
    schedule(seed)


def test_a_text_is_the_same_from_the_library() -> None:
    bench = Bench()
    for _ in range(2):
        (heard,) = bench.ask(settings(4)[0], **settings(4)[1])
        bench.run()
        check(heard, alone(4))
    assert heard.result.cached_tokens > 0


@pytest.mark.core(1)
@pytest.mark.parametrize(("prompt", "shown"), [("What is there?", {"images": PICTURES}), ([5] * 35, {})])
def test_several_answers_take_one_reading(prompt: Any, shown: dict[str, Any]) -> None:
    bench, options = Bench(), {"temp": 1.0, "max_tokens": 6, "mtp": "off", **shown}
    answers = bench.ask(prompt, 3, seed=5, **options)
    bench.run()
    assert not answers[0].lane.prepared.prompt.media
    assert bench.lanes.library.counts.read <= answers[0].result.prompt_tokens + 2 * 16
    for number, heard in enumerate(answers):
        assert heard.result.tokens == generate(*nano(), prompt, seed=5 + number, **options).tokens


def test_an_answer_tells_how_far_its_prompt_is_read() -> None:
    bench = Bench()
    bench.ask(**ENDLESS)  # beside it, a prompt is read in chunks
    bench.run(lambda: bool(bench.lanes.running))
    for prompt, known in ((LONG, 0), ([*LONG, 5], len(LONG) - 1)):
        lane = bench.ask(prompt, max_tokens=2)[0].lane
        bench.run(lambda lane=lane: bool(lane.request and lane.request.begun))
        assert lane.request and known <= lane.request.read < len(prompt)
        bench.run(lambda lane=lane: bool(lane.request and lane.request.tokens))
        assert lane.request.read == len(prompt)


# --- I2 -------------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_alone() -> None:
    bench, options = Bench(rows=8), {"temp": 0, "mtp": "off", "logprobs": True, "max_tokens": 4}
    prompts = [QUESTION, [5] * 40, [9] * 7]
    answers = [bench.ask(prompt, **options)[0] for prompt in prompts]
    bench.run()
    for heard, prompt in zip(answers, prompts, strict=True):
        expected = generate(*nano(), prompt, **options)
        pairs = zip(heard.result.logprobs or (), expected.logprobs or (), strict=True)
        np.testing.assert_allclose(*zip(*((a.logprob, b.logprob) for a, b in pairs), strict=True), rtol=0, atol=2e-5)


# --- I3 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sequences() -> Callable[[], list[Sequence]]:
    """A function that lists the sequences that came since the test began: other tests of the process may hold some."""
    gc.collect()
    before = {id(own) for own in gc.get_objects() if type(own) is Sequence}
    return lambda: [own for own in gc.get_objects() if type(own) is Sequence and id(own) not in before]


@pytest.mark.parametrize("requests", [4, pytest.param(500, marks=pytest.mark.full)])
def test_what_has_left_leaves_nothing(requests: int, sequences: Callable[[], list[Sequence]]) -> None:
    rng, bench = random.Random(1), Bench()

    def answer(count: int) -> None:
        for _ in range(count):
            prompt, options = settings(rng.randrange(len(CASES) - 1))
            (heard,) = bench.ask(prompt, **{**options, "max_tokens": 3})
            for _ in range(rng.randrange(3)):
                bench.lanes.turn()
            if rng.random() < 0.3:
                bench.lanes.drop(heard.lane.owner)
        bench.run()
        bench.ask(QUESTION, max_tokens=1, mtp="off")  # the draft head goes
        bench.run()
        bench.lanes.library.clear()

    answer(6)
    before = active()
    answer(requests)
    assert active() <= before + 65_536 and bench.lanes.engine.held() == []
    gc.collect()
    assert not sequences()


# --- I4: cancel -------------------------------------------------------------------------------------------------------


@pytest.mark.core(1)
@pytest.mark.parametrize("where", ["queue", "reading", "decoding"])
def test_a_cancel_ends_an_answer_within_a_step_and_no_other(
    where: str, sequences: Callable[[], list[Sequence]]
) -> None:
    bench = Bench(rows=2)
    prompt, options = settings(1)
    (first,) = bench.ask(prompt, **options)
    (gone,) = bench.ask(LONG if where == "reading" else prompt, seed=3, mtp="off", max_tokens=9)
    if where == "queue":
        bench.lanes.rows = 1
    moments: dict[str, Callable[[], bool]] = {
        "queue": lambda: bool(first.events),
        "reading": lambda: bool(gone.lane.request and gone.lane.request.reading),
        "decoding": lambda: len(gone.events) > 1,
    }
    bench.run(until=moments[where])
    assert not gone.results and moments[where]()
    if where == "reading":
        assert not gone.events
    bench.lanes.drop(gone.lane.owner)
    assert gone.result.finish_reason == "interrupted"
    assert len(bench.lanes.running) + len(bench.lanes.queue) == 1
    del gone.lane
    assert sequences() in ([], [first.lane.request])
    bench.run()
    check(first, alone(1))


# --- I5: chunks while others decode -----------------------------------------------------------------------------------


@dataclass
class Followed(Prepared):
    """Tells of the chunks that are read of its prompt."""

    progress: Callable[[int], None]

    def request(self, *given: Any) -> Sequence:
        request = super().request(*given)
        request.progress = self.progress
        return request


def reads(bench: Bench, seconds: Callable[[int, int], float], heard: Heard) -> list[tuple[int, float, bool]]:
    """The chunks of a prompt as it is read: its tokens, its seconds by the clock, and whether others decoded."""
    chunks: list[tuple[int, float, bool]] = []

    def progress(tokens: int) -> None:
        took = seconds(tokens, sum(own[0] for own in chunks))
        bench.now += took
        others = [own for own in bench.lanes.running.values() if own is not heard.lane and own.request.tokens]
        chunks.append((tokens, took, bool(others)))

    heard.lane.prepared = Followed(**vars(heard.lane.prepared), progress=progress)
    return chunks


@pytest.mark.parametrize(
    "seconds",
    [
        lambda tokens, before: 0.06 + 0.002 * tokens,
        pytest.param(lambda tokens, before: 0.004 * tokens, marks=pytest.mark.full),
        pytest.param(lambda tokens, before: 0.02 + 0.05 * tokens, marks=pytest.mark.full),
        lambda tokens, before: 0.03 + (0.003 + before / 10**6) * tokens,
    ],
)
def test_no_chunk_keeps_others_waiting_for_long(seconds: Callable[[int, int], float]) -> None:
    bench = Bench()
    (first,) = bench.ask(max_tokens=150, mtp="off", temp=0, **ENDLESS)
    reads(bench, seconds, first)
    bench.run(until=lambda: bool(first.events))
    (late,) = bench.ask(LONG, max_tokens=2, mtp="off")
    chunks = reads(bench, seconds, late)
    bench.run(until=lambda: bool(late.events))
    assert sum(tokens for tokens, *_ in chunks) == len(LONG) and not first.results
    assert all(others and took <= CHUNK_SECONDS for _, took, others in chunks)
    assert max(took for _, took, _ in chunks) > CHUNK_SECONDS / 3  # as long as they may be
    bench.lanes.close(RuntimeError())


def test_a_prompt_is_read_in_whole_chunks_when_nobody_decodes() -> None:
    bench = Bench()
    (only,) = bench.ask(LONG, max_tokens=2, mtp="off")
    chunks = reads(bench, lambda tokens, before: 9.0 * tokens, only)
    bench.run()
    assert [tokens for tokens, *_ in chunks] == [len(LONG) - 1, 1]


def test_a_prompt_that_one_chunk_finishes_goes_first_once() -> None:
    bench, order = Bench(rows=8), []
    (first,) = bench.ask(max_tokens=200, mtp="off", temp=0, **ENDLESS)
    reads(bench, lambda tokens, before: 0.01 * tokens, first)
    bench.run(until=lambda: bool(first.events))
    for name, prompt in (("long", LONG), ("one", [5] * 9), ("other", [6] * 9)):
        (heard,) = bench.ask(prompt, max_tokens=2, mtp="off")
        heard.lane.tell = lambda event, name=name: order.append(name)
    bench.run(until=lambda: len(set(order)) == 3)
    assert list(dict.fromkeys(order)) == ["one", "long", "other"]
    bench.lanes.close(RuntimeError())


def test_images_are_encoded_in_steps_of_their_own() -> None:
    bench = Bench()
    (first,) = bench.ask(max_tokens=90, mtp="off", temp=0, **ENDLESS)
    bench.run(until=lambda: bool(first.events))
    (seeing,) = bench.ask("What is there?", images=["examples/pictures/shapes.png", "examples/pictures/triangle.png"])
    chunks, told = reads(bench, lambda tokens, before: 0.0, seeing), len(first.events)
    assert bench.model.vision
    for _ in range(2):
        bench.lanes.turn()
        assert not chunks and bench.model.vision.loaded
    bench.lanes.turn()
    assert chunks and len(first.events) == told + 3
    bench.lanes.close(RuntimeError())


# --- I7, I8: ends -----------------------------------------------------------------------------------------------------


def test_an_error_ends_one_answer_alone() -> None:
    seen = []

    def wrong(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(len(tokens))
        if len(seen) > 3:
            raise KeyError("mine")
        return logits

    bench = Bench()
    prompt, options = settings(1)
    (good,) = bench.ask(prompt, **options)
    (bad,) = bench.ask(QUESTION, max_tokens=30, logits_processors=[wrong])
    (late,) = bench.ask(prompt, **options)
    bench.run()
    assert (
        bad.result.finish_reason == "error"
        and bad.result.tokens
        and ApiError.of(bad.result.error or Exception()).status == 500
    )
    for heard in (good, late):
        check(heard, alone(1))


def test_an_answer_that_cannot_begin_ends_alone() -> None:
    bench = Bench()
    prompt, options = settings(1)
    (good,) = bench.ask(prompt, **options)
    bench.run(until=lambda: bool(good.events))
    (bad,) = bench.ask()
    bad.lane.prepared = replace(bad.lane.prepared, processor=None)
    bench.run()
    check(good, alone(1))
    assert isinstance(bad.result.error, AttributeError)


def test_an_unexpected_exception_ends_what_runs_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, prompt, options = Bench(rows=2), *settings(1)
    answers = [bench.ask(prompt, **options)[0] for _ in range(3)]
    bench.run(until=lambda: all(heard.events for heard in answers[:2]))
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: step(engine) and 1 / 0)
    bench.lanes.turn()
    monkeypatch.undo()
    assert [isinstance(heard.result.error, ZeroDivisionError) for heard in answers[:2]] == [True, True]
    bench.run()
    check(answers[2], alone(1))


def test_what_fails_behind_an_end_does_not_keep_it_from_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    (heard,) = bench.ask(max_tokens=1)
    monkeypatch.setattr(bench.admission, "make_room", lambda rows, *given: bool(list(rows)) or 1 / 0)
    bench.run()
    assert heard.result.tokens and bench.lanes.idle


def test_the_end_of_the_lanes_is_told_to_all() -> None:
    bench = Bench(rows=1)
    running, waiting = (bench.ask(max_tokens=90, **ENDLESS)[0] for _ in range(2))
    bench.run(until=lambda: len(running.events) > 2)
    bench.lanes.close(ApiError(503, "server_closing", "it ends"))
    assert running.result.finish_reason == "interrupted" and running.result.error is None and running.text
    assert ApiError.of(waiting.result.error or Exception()).code == "server_closing" and bench.lanes.idle


@pytest.mark.parametrize("where", ["queue", "reading", "decoding"])
def test_out_of_time(where: str) -> None:
    bench = Bench(rows=1 if where == "queue" else 4)
    first = bench.ask(max_tokens=90, mtp="off", **ENDLESS)[0]
    bench.run(until=lambda: bool(first.events))
    asked: tuple[Any, dict[str, Any]] = (LONG, {}) if where == "reading" else (QUESTION, ENDLESS)
    (late,) = bench.ask(asked[0], until=10.0, **asked[1])
    for _ in range(6):
        bench.lanes.turn()
    assert (bool(late.lane.request), bool(late.events)) == (where != "queue", where == "decoding")
    bench.now = 10.0
    bench.lanes.turn()
    if where == "decoding":
        assert (late.result.finish_reason, late.result.limited_by) == ("length", "timeout") and late.result.tokens
    else:
        refused = ApiError.of(late.result.error or Exception())
        assert (refused.status, refused.code, "Retry-After" in refused.headers) == (503, "request_timeout", True)
    if where == "reading":
        (again,) = bench.ask(LONG, max_tokens=1)
        bench.run(until=lambda: bool(again.results))
        assert again.result.cached_tokens > 0  # it goes on where the first was ended
    assert not first.results
    bench.lanes.close(RuntimeError())
