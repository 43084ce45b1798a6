"""Admission by the memory plan: what never fits, what waits, what grows, and that no plan is below the peak."""

import itertools
import random
from dataclasses import replace

import mlx.core as mx
import pytest
from memory_use import active
from refusing import refused
from server.lanes import ENDLESS, QUESTION, Bench, nano

from mlx_qwen35.budget.plan import Machine, state_bytes
from mlx_qwen35.budget.rows import RowNeeds, RowsPlan
from mlx_qwen35.cache.prefix import RANKS
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.server.admission import GROWN, RESERVED, default_rows

EIGHT_GB = Machine("8 GB", int(8 * 2**30 * 2 / 3), mx.float16, "fused")
WEIGHTS = 2_900_000_000  # of the 4B in 4 bit


@pytest.fixture
def plan() -> RowsPlan:
    return RowsPlan(parse_config(geometry("4b")).text, EIGHT_GB, WEIGHTS, head=200_000_000, encoder=700_000_000)


def limit_for(rows: int, tokens: int, prompt: int = 30) -> int:
    """Bytes in which so many answers of nano fit, each with its prompt in so many tokens, and no more."""
    own = Bench().admission.plan
    needs = [RowNeeds(prompt, tokens - prompt)] * rows
    machine = replace(own.machine, limit=6_000_000_000)  # whose rooms for prefill and buffers are a small machine's
    return replace(own, machine=machine).nbytes(needs) + 1000


# --- the plan -------------------------------------------------------------------------------------------------------


def test_rows_of_8_gb(plan: RowsPlan) -> None:
    assert default_rows(EIGHT_GB.limit) == 2 and default_rows(11_500_000_000) == 4 and default_rows(25 * 10**9) == 8
    short, long = RowNeeds(2000, RESERVED), RowNeeds(16_000, RESERVED)
    assert plan.fits([short, short]) and plan.fits([long, short])
    assert not plan.fits([RowNeeds(60_000, RESERVED), long])
    assert not plan.fits([RowNeeds(90_000, 1)])


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": 4000}, {"answer": 4000}, {"depth": 1}, {"encoding": 10**8},
        {"prompt": 4000, "depth": 3},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_a_row_needs_more_of_counts(plan: RowsPlan, more: dict[str, int]) -> None:
    row = RowNeeds(1000, 1000)
    assert plan.nbytes([replace(row, **more), row]) > plan.nbytes([row, row]) > plan.nbytes([row]) > WEIGHTS
    assert plan.nbytes([replace(row, waits=False)]) < plan.nbytes([row])
    assert plan.nbytes([row], apart=5) == plan.nbytes([row]) + 5


def test_states_snapshots_and_a_reading_count(plan: RowsPlan) -> None:
    row, state = RowNeeds(1000, 1000), state_bytes(plan.config, 2)
    assert plan.nbytes([row]) - plan.nbytes([replace(row, waits=False)]) == len(RANKS) * state
    assert plan.nbytes([row, row]) - plan.nbytes([row]) > (2 + len(RANKS)) * state
    assert plan.nbytes([RowNeeds(2000, 1)]) - plan.nbytes([RowNeeds(1, 2000)]) > 20_000_000


def test_the_longest_context_is_the_last_that_fits(plan: RowsPlan) -> None:
    most = plan.most(1000)
    assert plan.fits([RowNeeds(1000, most - 1000)]) and not plan.fits([RowNeeds(1000, most - 999)])


# --- what comes in --------------------------------------------------------------------------------------------------


def test_what_never_fits_is_refused_in_the_planners_words() -> None:
    bench = Bench(limit=limit_for(1, 2000, 1000))
    bench.admission.needs(bench.prepare([5] * 1000))
    with refused("memory_exceeded", "5,001"):
        bench.admission.needs(bench.prepare([5] * 5000))
    with refused("memory_exceeded", "max_tokens"):
        bench.admission.needs(bench.prepare(QUESTION, max_tokens=20_000))
    with refused("context_length_exceeded"):
        bench.prepare([5] * 40_000)


def test_rows_run_as_far_as_memory_has_room_and_in_order() -> None:
    bench = Bench(rows=8, limit=limit_for(2, 2000))
    given = {"max_tokens": 1900, "mtp": "off", **ENDLESS}
    answers = [bench.ask(seed=seed, **given)[0] for seed in range(4)]
    bench.run(until=lambda: len(answers[1].events) > 2)
    assert len(bench.lanes.running) == 2 and bench.lanes.waiting == 2
    assert [bool(own.lane.request) for own in answers] == [True, True, False, False]
    bench.lanes.drop(answers[0].lane.owner)
    bench.lanes.turn()
    assert [bool(own.lane.request) for own in answers] == [True, True, True, False]


def test_rows_are_no_more_than_the_server_was_given() -> None:
    bench = Bench(rows=3)
    answers = [bench.ask(max_tokens=5, seed=seed, **ENDLESS)[0] for seed in range(5)]
    seen = []
    bench.run(until=lambda: bool(seen.append(len(bench.lanes.running))))
    assert max(seen) == 3 and all(own.result.finish_reason == "length" for own in answers)


def test_snapshots_go_first() -> None:
    last = {"max_tokens": 2900, "mtp": "off", **ENDLESS}
    tokens = len(Bench().prepare(QUESTION, **last).prompt.tokens)
    bench = Bench(limit=limit_for(1, tokens + 2900, tokens))
    bench.ask(f"What is 3{'4' * 10}?", max_tokens=2, enable_thinking=False, mtp="off")
    bench.run()
    assert (before := bench.lanes.library.nbytes) > 0
    (answer,) = bench.ask(**last)
    bench.lanes.turn()
    assert answer.lane.request and bench.lanes.library.nbytes < before


# --- an answer of no stated length ------------------------------------------------------------------------------------


def test_an_answer_of_no_stated_length_grows() -> None:
    bench = Bench()
    (answer,) = bench.ask(mtp="off", **ENDLESS)
    lane = answer.lane
    assert lane.needs.answer == RESERVED
    lane.needs = replace(lane.needs, answer=64)  # as if it had come so far
    bench.run(until=lambda: lane.needs.answer > 64)
    assert lane.needs.answer == 64 + GROWN and 40 < len(lane.request.tokens) < 64


def test_an_answer_that_memory_has_little_room_for_ends_by_it() -> None:
    bench = Bench(limit=limit_for(1, 256, 246))
    (answer,) = bench.ask([5] * 246, mtp="off", regex="[ab]{9000}")
    assert answer.lane.needs.answer == 8
    bench.run()
    assert (answer.result.finish_reason, answer.result.limited_by) == ("length", "memory") and answer.text


def test_without_room_to_grow_the_youngest_of_no_stated_length_ends() -> None:
    bench = Bench(limit=limit_for(3, 160))
    given = {"mtp": "off", **ENDLESS}
    old, young = bench.ask(seed=1, **given)[0], bench.ask(seed=2, **given)[0]
    fixed = bench.ask(seed=3, max_tokens=110, **given)[0]
    for own in (old, young):
        own.lane.needs = replace(own.lane.needs, answer=70)
    bench.run(until=lambda: bool(young.results))
    assert (young.result.finish_reason, young.result.limited_by) == ("length", "memory")
    assert young.text and not old.results and not fixed.results
    bench.run(until=lambda: bool(fixed.results))
    assert (fixed.result.limited_by, fixed.result.generation_tokens) == ("max_tokens", 110)
    bench.lanes.close(RuntimeError())


# --- against MLX's count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 12))])
def test_no_plan_is_below_the_peak(seed: int) -> None:
    """Of random answers, beside what else this process holds."""
    rng = random.Random(seed)
    mx.clear_cache()
    bench, weights = Bench(rows=4), Bench().admission.plan.weights
    others = active() - weights
    picture = {"images": ["examples/pictures/shapes.png"]}
    mx.reset_peak_memory()
    planned = 0
    waiting = [
        {"prompt": [rng.randrange(300)] * rng.choice([5, 40, 300]), "mtp": rng.choice(["on", "off"])}
        if rng.random() < 0.8 else {"prompt": "What is there?", "mtp": "off", **picture}
        for _ in range(6)
    ]  # fmt: skip
    for step in itertools.count():
        if waiting and step % 3 == 0:
            bench.ask(**waiting.pop(), max_tokens=rng.choice([3, 10, 25]), seed=step, temp=1.0)
        bench.lanes.turn()
        rows = [lane.room for lane in bench.lanes.running.values()]
        apart = bench.lanes.library.apart(bench.lanes.engine.held())
        planned = max(planned, bench.admission.plan.nbytes(rows, apart) + bench.lanes.library.nbytes)
        if bench.lanes.idle and not waiting:
            break
    kept = bench.admission.plan.machine.kept  # MLX's count of the peak has no freed buffers
    assert 0 < mx.get_peak_memory() - others <= planned - kept


def test_the_model_is_not_asked_what_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, taken = Bench(), []
    monkeypatch.setattr(mx, "get_active_memory", lambda: taken.append("memory") or 0)
    for name in ("eval", "async_eval", "zeros", "concatenate"):
        monkeypatch.setattr(mx, name, lambda *given, **named: pytest.fail("MLX was used"))
    prepared = bench.prepare(QUESTION, 2, seed=3, json_schema={"type": "object"}, thinking_budget=50)
    bench.admission.needs(prepared)
    assert not taken and [own.seed for own in prepared.plans] == [3, 4]


def test_models_are_shared() -> None:
    assert Bench().model is nano()[0]
