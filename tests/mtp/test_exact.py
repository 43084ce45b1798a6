"""Decoding with drafts gives the tokens, and leaves the memory, of decoding without.

The head of a random checkpoint is almost never right, so most tests put guesses in the place of its own, which are
right as often as a pattern says. Seeds are such that no two best candidates are closer than the rounding of products
of one and of several rows (1e-6 relative): with about 20 tokens a text that is one seed in thousands.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mtp import drafting
from mtp.drafting import Case, Interrupt, cycle, distance, force, head_distance, of_row, prompt, run

from mlx_qwen35 import Processor, batch_generate, generate, load
from mlx_qwen35.backend import backend
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import KVRow
from mlx_qwen35.engine.drafts import speculate
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.rows import Rows
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.model.model import Model

SAME = 2e-5  # of the largest number of an array: products of one and of several rows may sum in another order
LONG = 24  # tokens of a text

SAMPLINGS = {
    "greedy": Sampling(temp=0),
    "cool": Sampling(temp=0.3),
    "plain": Sampling(temp=1),
    "hot": Sampling(temp=2),
    "top-k": Sampling(top_k=7),
    "top-p and min-p": Sampling(temp=1.5, top_p=0.8, min_p=0.01),
    "presence": Sampling(temp=0.2, presence_penalty=1.5),
    "frequency": Sampling(temp=0, frequency_penalty=2.0),
    "repetition": Sampling(temp=0.1, repetition_penalty=1.8),
    "bias": Sampling(temp=0.5, logit_bias={5: 4.0, 7: 4.0, 9: -100.0}, presence_penalty=0.7),
    "all": Sampling(0.8, 20, 0.9, 0.01, 0.5, 0.4, 1.2, {3: 3.0, 4: 3.0}, 3, 0.5, 0.05, (3,)),
}
CASES = {name: Case(prompt(i, 1 + 3 * i), sampling, 11 + i) for i, (name, sampling) in enumerate(SAMPLINGS.items())}
PLAIN = CASES["plain"]
PATTERNS = [(0,), (1,), (2,), (3,), (3, 0, 2, 1), (0, 3, 1, 1, 2)]

Plain = Callable[[Case], list[int]]


@pytest.fixture(scope="module")
def model(checkpoint_folder, tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("small")
    return drafting.load_small(checkpoint_folder(drafting.SMALL, vision=False), folder / "model")


@pytest.fixture(scope="module")
def plain(model) -> Plain:
    """What a case is answered alone and without drafts, LONG tokens; worked out once."""
    known: dict[str, list[int]] = {}

    def text(case: Case) -> list[int]:
        if repr(case) not in known:
            known[repr(case)] = run(model, [case], LONG).tokens[0]
        return known[repr(case)]

    return text


@pytest.fixture(scope="module")
def clean(model, plain) -> Callable[[Case], dict[int, drafting.Contents]]:
    """What a cache holds after each token of a case's text, read one by one."""
    known: dict[str, dict[int, drafting.Contents]] = {}

    def contents(case: Case) -> dict[int, drafting.Contents]:
        if repr(case) not in known:
            known[repr(case)] = drafting.step_by_step(model, case, plain(case))
        return known[repr(case)]

    return contents


@pytest.fixture
def forced(monkeypatch, plain) -> Callable[..., None]:
    """(cases, pattern): the head's proposals are of these cases' texts, right as often as the pattern says."""

    def put(cases: Sequence[Case], pattern: drafting.Pattern) -> None:
        force(monkeypatch, cases, [plain(case) for case in cases], pattern)

    return put


# --- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.core(4)
@pytest.mark.parametrize("name", CASES)
def test_a_text_is_the_same_with_the_head_s_own_drafts(name, model, plain):
    case, depth = CASES[name], 1 + list(CASES).index(name) % 3
    assert run(model, [case], 8, depth).tokens == [plain(case)[:8]]


@pytest.mark.core(4)
@pytest.mark.parametrize("name", CASES)
def test_a_text_is_the_same_however_many_drafts_are_right(name, model, plain, forced):
    case, depth = CASES[name], 1 + (list(CASES).index(name) + 1) % 3
    forced([case], cycle(3, 0, 1, 2, 3, 3))
    assert run(model, [case], LONG, depth).tokens == [plain(case)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_pattern_of_right_drafts_gives_the_same_text_in_as_many_steps_as_it_should(pattern, model, plain, forced):
    forced([PLAIN], cycle(*pattern))
    result = run(model, [PLAIN], 18, 3)
    left, steps = 17, 0  # the first token is of the prompt
    while left > 0:
        left -= 1 + min(pattern[steps % len(pattern)], 3, left - 1)
        steps += 1
    assert (result.tokens, result.sequences[0].drafts.steps) == ([plain(PLAIN)[:18]], steps)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("limit", range(1, 8))
def test_an_answer_ends_exactly_at_its_limit(limit, depth, model, plain, forced):
    forced([PLAIN], cycle(3))
    assert run(model, [PLAIN], limit, depth).tokens == [plain(PLAIN)[:limit]]


LIMITS = [20, 3, 1, 13, 9, 16, 2, 11, 5, 18, 12]


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full), 3])
def test_a_batch_of_all_samplings_lengths_and_limits_gives_each_row_its_own_text(depth, model, plain, forced):
    cases = list(CASES.values())
    forced(cases, lambda row, step: (row + step * (1 + row % 3)) % 4)
    expected = [plain(case)[:limit] for case, limit in zip(cases, LIMITS, strict=True)]
    assert run(model, cases, LIMITS, depth).tokens == expected


def test_a_batch_with_the_head_s_own_drafts_gives_each_row_its_own_text(model, plain):
    cases = list(CASES.values())[3:8]
    assert run(model, cases, [6, 9, 1, 7, 4], 2).tokens == [
        plain(case)[:n] for case, n in zip(cases, (6, 9, 1, 7, 4), strict=True)
    ]


def test_a_row_near_its_limit_is_drafted_no_more_than_it_may_have(model, forced):
    cases = [CASES["greedy"], CASES["hot"], CASES["cool"]]
    forced(cases, cycle(3))
    sequences = run(model, cases, [9, 2, 3], 3).sequences
    assert [sequence.drafts.drafted for sequence in sequences] == [6, 0, 1]


SCRIPT = [0, 2, 0, 0, 3, 1, 0, 3, 3, 0, 1, 2]


@pytest.mark.parametrize("names", [["all"], ["greedy", "cool", "hot"]], ids=["one row", "three rows"])
def test_the_depth_may_change_at_every_step(names, model, plain, forced):
    cases = [CASES[name] for name in names]
    forced(cases, lambda row, step: (row + step) % 4)
    assert run(model, cases, 22, SCRIPT).tokens == [plain(case)[:22] for case in cases]


def test_rows_of_one_prompt_and_other_seeds_keep_their_own_noise(model, plain, forced):
    cases = [PLAIN._replace(seed=seed) for seed in range(30, 34)]
    forced(cases, lambda row, step: (2 * row + step) % 4)
    assert run(model, cases, 14, 3).tokens == [plain(case)[:14] for case in cases]


@pytest.mark.full
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("temp", [0, 0.3, 1, 2])
def test_many_seeds_and_lengths_give_the_same_text(temp, depth, model, plain, forced):
    cases = [Case(prompt(seed, 1 + seed % 11), Sampling(temp), seed) for seed in range(40, 64)]
    expected = [plain(case) for case in cases]
    for own, case in zip(expected, cases, strict=True):
        assert run(model, [case], LONG, depth).tokens == [own]
    rng = np.random.default_rng(depth)
    forced(cases, lambda row, step: rng.integers(0, 4))
    assert run(model, cases, LONG, depth).tokens == expected


# --- the same memory after every step --------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A row after a step with drafts."""

    seed: int  # by which it is known
    count: int  # tokens read
    position: int  # the next token's
    contents: drafting.Contents


@pytest.fixture
def kept(monkeypatch) -> list[list[Kept]]:
    """After each step with drafts: the rows that it fed."""
    steps, settle = [], Rows.settle

    def spy(rows: Rows) -> None:
        drafted = rows.current is not None and rows.current.depth
        settle(rows)
        if drafted:
            places = zip(rows.sequences, rows.cache.row_lengths, rows.cache.next_positions, strict=True)
            own = [of_row(rows.cache, row) for row in range(len(rows.sequences))]
            steps.append([Kept(s.sampler.seed, *at, known) for (s, *at), known in zip(places, own, strict=True)])

    monkeypatch.setattr(Rows, "settle", spy)
    return steps


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_after_every_step_the_memory_is_that_of_tokens_read_one_by_one(pattern, model, clean, forced, kept):
    forced([PLAIN], cycle(*pattern))
    cache = run(model, [PLAIN], 20, 3).cache
    length, end = len(PLAIN.prompt), len(PLAIN.prompt) + 19
    for step, [(_, count, position, contents)] in enumerate(kept):
        length += 1 + min(pattern[step % len(pattern)], end - length - 1)
        assert count == position == length
        assert distance(contents, clean(PLAIN)[count]) < SAME
    assert cache.row_lengths == [end] and end - length <= 1  # the last one without drafts
    assert distance(of_row(cache), clean(PLAIN)[end]) < SAME


def test_after_every_step_of_a_batch_each_row_s_memory_is_its_own(model, clean, forced, kept):
    cases = [CASES[name] for name in ("greedy", "hot", "all")]
    forced(cases, lambda row, step: (row * step + row) % 4)
    caches, seeds = run(model, cases, [19, 6, 15], [3, 3, 1, 0, 2, 3]).caches, {case.seed: case for case in cases}
    for seed, count, position, contents in itertools.chain(*kept):
        assert count == position
        assert distance(contents, clean(seeds[seed])[count]) < SAME
    assert {len(step) for step in kept} == {1, 2, 3}
    for case, cache, count in zip(cases, caches, (18, 5, 14), strict=True):
        assert cache.row_lengths == [len(case.prompt) + count]
        assert distance(of_row(cache), clean(case)[cache.length]) < SAME


@pytest.fixture(scope="module")
def packed(checkpoint_folder, tmp_path_factory) -> Model:
    """The same model in 4 bits: its products go row by row on the CPU, so that they are those of single rows."""
    folder = tmp_path_factory.mktemp("packed")
    return drafting.load_small(checkpoint_folder(drafting.SMALL, vision=False), folder / "model", bits=4)


@pytest.mark.core(1)
@pytest.mark.skipif(not backend().unpacks_for_many_rows, reason="products go row by row on the CPU alone")
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_packed_model_s_memory_is_the_same_to_the_bit(depth, packed, monkeypatch, kept):
    """In the layers that no attention precedes: its products are of floats, and may round otherwise."""
    text = run(packed, [PLAIN], LONG).tokens[0]
    clean = drafting.step_by_step(packed, PLAIN, text)
    force(monkeypatch, [PLAIN], [text], cycle(3, 0, 2, 1))
    assert run(packed, [PLAIN], LONG, depth).tokens == [text]
    assert len(kept) > 5
    for [(_, count, _, contents)] in kept:
        assert distance(contents, clean[count], lambda name: not name.startswith("layers.2")) == 0
        assert distance(contents, clean[count]) < SAME


@pytest.mark.parametrize("counts", [[1, 4], [3, 2], [2, 2], [0, 1], [4, 0]], ids=str)
def test_of_a_step_only_the_tokens_that_are_kept_leave_a_trace(counts, model):
    """A row of which nothing is kept had nothing to read. A bound would not hide the memory of a token too many."""
    begin, guesses = mx.array([prompt(1, 6), prompt(2, 6)]), mx.array([prompt(3, 4), prompt(4, 4)])
    lengths = None if min(counts) else [4 * (count > 0) for count in counts]
    cache, other = model.make_cache(2), model.make_cache(2)
    for each in (cache, other):
        model.hidden(begin, each)
    place = cache.position
    model.hidden(guesses, cache, lengths, stepwise=True)
    every = [cache.arrays(row) for row in range(2)]
    cache.rollback(place, counts)
    model.hidden(guesses[:, : max(counts)], other, counts if min(counts) < max(counts) else None)
    assert (cache.row_lengths, cache.next_positions) == (other.row_lengths, other.next_positions)
    for row, count in enumerate(counts):
        assert distance(of_row(cache, row), of_row(other, row)) < SAME
        for name, kept in cache.arrays(row).items():
            if name.endswith("recurrent_state"):
                off = float(mx.abs(every[row][name] - kept).max() / mx.abs(kept).max())
                assert (off > 1e-2) == (count in (1, 2, 3))


# --- what the head remembers -----------------------------------------------------------------------------------------


@pytest.mark.core(4)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_head_has_read_the_text_as_if_at_once(pattern, depth, model, plain, forced):
    forced([PLAIN], cycle(*pattern))
    cache = run(model, [PLAIN], 12, depth).cache
    assert head_distance(model, [cache], [[*PLAIN.prompt, *plain(PLAIN)[:11]]]) < SAME


@pytest.mark.core(4)
@pytest.mark.parametrize("begin", [1, 2, 7])
@pytest.mark.parametrize("script", [SCRIPT, [0] * 9 + [3, 0, 0, 0, 2, 0], [2, 0], [0, 1]], ids=str)
def test_the_head_has_read_the_text_whatever_the_depths_were(script, begin, model, plain, forced):
    case = Case(prompt(50, begin), seed=3)
    forced([case], cycle(2, 0, 3))
    cache = run(model, [case], 20, script).cache
    assert head_distance(model, [cache], [[*case.prompt, *plain(case)[:19]]]) < SAME


def test_pairs_that_wait_are_read_when_there_are_many(model, plain, forced, monkeypatch):
    monkeypatch.setattr(speculate, "MOST_PENDING", 4)
    forced([PLAIN], cycle(1))
    cache = run(model, [PLAIN], 18, [0] * 10 + [2, 0]).cache
    assert sum(pairs.tokens.shape[1] for pairs in cache.follower.pending) < 4
    assert head_distance(model, [cache], [[*PLAIN.prompt, *plain(PLAIN)[:17]]]) < SAME


@pytest.mark.parametrize("script", [[3], SCRIPT], ids=["3", "mixed"])
def test_the_head_has_read_each_row_of_a_batch(script, model, plain, forced):
    cases = [CASES[name] for name in ("greedy", "cool", "hot", "top-k")]
    forced(cases, lambda row, step: (row + step * row) % 4)
    limits = [17, 8, 12, 1]
    result = run(model, cases, limits, script)
    texts = [[*case.prompt, *own[:-1]] for case, own in zip(cases, result.tokens, strict=True)]
    assert head_distance(model, result.caches, texts) < SAME


def test_the_head_goes_on_with_a_second_prompt(model, plain, forced):
    cache = run(model, [PLAIN], 9, 2).cache
    again = Case(prompt(60, 5), seed=4)
    whole = Case((*PLAIN.prompt, *plain(PLAIN)[:8], *again.prompt), seed=4)
    forced([whole], cycle(0, 2, 3))
    assert run(model, [again], 9, 3, cache=cache).tokens == [plain(whole)[:9]]
    assert head_distance(model, [cache], [[*whole.prompt, *plain(whole)[:8]]]) < SAME


# --- what the cache has read in the end ------------------------------------------------------------------------------


def goes_on_as_plain(model: Model, cache: Cache, read_tokens: Sequence[int]) -> bool:
    """Whether a second prompt is answered from this cache as if everything had been read at once."""
    again = Case(prompt(61, 3), seed=5)
    whole = Case((*read_tokens, *again.prompt), seed=5)
    return run(model, [again], 4, cache=cache).tokens == run(model, [whole], 4).tokens


@pytest.mark.core(11)
@pytest.mark.parametrize(("count", "depths"), [*((n, 3) for n in (1, 2, 4, 5, 8)), *((n, [0, 2]) for n in (2, 3, 4))])
@pytest.mark.parametrize("end", ["stop id", "stop string", "closed", "limit"])
def test_the_cache_has_read_what_was_yielded(end, count, depths, model, plain, clean, forced):
    """Ends at every place of steps whose drafts are all right; at a limit the last token is not read."""
    forced([PLAIN], cycle(3))
    text = plain(PLAIN)
    assert len(set(text[:10])) == 10, "a stop id must come once"
    options = {
        "stop id": {"stop_ids": {text[count - 1]}},
        "stop string": {"ends": [count]},
        "closed": {"most": count},
        "limit": {},
    }[end]
    result = run(model, [PLAIN], count if end == "limit" else 16, depths, **options)
    assert result.tokens == [text[:count]]
    done = len(PLAIN.prompt) + count - (end == "limit")
    assert result.cache.row_lengths == result.cache.next_positions == [done]
    assert distance(of_row(result.cache), clean(PLAIN)[done]) < SAME
    if count in (1, 3, 6):
        tokens = [*PLAIN.prompt, *text][:done]
        assert head_distance(model, [result.cache], [tokens]) < SAME
        assert goes_on_as_plain(model, result.cache, tokens)


@pytest.mark.parametrize("stops", [(3, 6, 9), (5, 1, 2), (4, 4, 8)], ids=str)
def test_each_row_of_a_batch_has_read_what_was_yielded_of_it(stops, model, plain, clean, forced):
    cases = [CASES[name] for name in ("cool", "plain", "hot")]
    forced(cases, lambda row, step: (3 - row + step) % 4)
    result = run(model, cases, 12, 3, ends=stops)
    assert result.tokens == [plain(case)[:n] for case, n in zip(cases, stops, strict=True)]
    assert [cache.length for cache in result.caches] == [len(c.prompt) + n for c, n in zip(cases, stops, strict=True)]
    for case, cache in zip(cases, result.caches, strict=True):
        assert distance(of_row(cache), clean(case)[cache.length]) < SAME
    texts = [[*case.prompt, *own] for case, own in zip(cases, result.tokens, strict=True)]
    assert head_distance(model, result.caches, texts) < SAME


def interrupting(function: Callable, call: int, after: bool) -> Callable:
    """The function, interrupted at the given call of it, before it does anything or once it has done everything."""
    left = [call]

    def interrupted(*args, **options):
        left[0] -= 1
        if not left[0] and not after:
            raise Interrupt
        result = function(*args, **options)
        if not left[0]:
            raise Interrupt
        return result

    return interrupted


@pytest.mark.parametrize("call", [2, 3])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (drafting.Speculation, "record"), (Sampler, "set_width"), (drafting.DraftFollower, "propose"),
        (Model, "hidden"), (Cache, "rollback"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_a_cache_goes_back_to_its_snapshot_after_an_interruption(owner, name, call, model, forced, monkeypatch):
    places = []
    forced([PLAIN], cycle(2))

    def remember(cache: Cache) -> None:
        places.append((cache.snapshot(), of_row(cache), of_row(cache.follower.cache)))
        monkeypatch.setattr(owner, name, interrupting(getattr(owner, name), call, after=False))

    result = run(model, [PLAIN], 20, 3, before=remember)
    [(place, contents, head)] = places
    assert 0 < len(result.tokens[0]) < 20
    result.cache.restore(place)
    assert distance(of_row(result.cache), contents) == distance(of_row(result.cache.follower.cache), head) == 0
    tokens = list(PLAIN.prompt)
    assert head_distance(model, [result.cache], [tokens]) < SAME
    assert goes_on_as_plain(model, result.cache, tokens)


@pytest.mark.parametrize("call", [2, 3, 4])
@pytest.mark.parametrize(
    ("owner", "name"), [(drafting.Speculation, "record"), (drafting.DraftFollower, "propose"), (Model, "hidden")]
)
def test_an_interrupted_step_leaves_nothing_that_was_not_yielded(
    owner, name, call, model, plain, clean, forced, monkeypatch
):
    forced([PLAIN], cycle(2))

    def begin(cache: Cache) -> None:
        monkeypatch.setattr(owner, name, interrupting(getattr(owner, name), call, after=False))

    result = run(model, [PLAIN], 20, 3, before=begin)
    monkeypatch.undo()
    (tokens,), (length,) = result.tokens, result.cache.row_lengths
    done = length - len(PLAIN.prompt)
    assert tokens == plain(PLAIN)[: len(tokens)] and len(tokens) - 1 <= done <= len(tokens) < 20
    assert distance(of_row(result.cache), clean(PLAIN)[length]) < SAME
    assert head_distance(model, [result.cache], [[*PLAIN.prompt, *tokens[:done]]]) < SAME


# --- small buffers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch) -> None:
    """Keys and values move to larger buffers often."""
    monkeypatch.setattr(KVRow, "STEP", 8)


def test_rows_of_very_unequal_acceptance_keep_their_texts_and_memories(model, plain, clean, forced, kept, small):
    """Rows take turns with right drafts."""
    cases = [CASES[name] for name in ("plain", "hot", "top-k")]
    forced(cases, lambda row, step: 3 * (step % 3 == row))
    result, seeds = run(model, cases, [24, 20, 24], 3), {case.seed: case for case in cases}
    assert result.tokens == [plain(case)[:n] for case, n in zip(cases, (24, 20, 24), strict=True)]
    for seed, count, position, contents in itertools.chain(*kept):
        assert count == position and distance(contents, clean(seeds[seed])[count]) < SAME
    texts = [[*case.prompt, *plain(case)][: cache.length] for case, cache in zip(cases, result.caches, strict=True)]
    assert head_distance(model, result.caches, texts) < SAME


def test_a_row_that_always_and_one_that_never_accepts_keep_their_texts(model, plain, clean, forced, small):
    cases = [CASES["hot"], CASES["plain"]]
    forced(cases, lambda row, step: 3 * row)
    result = run(model, cases, [14, 24], 3)
    assert result.tokens == [plain(cases[0])[:14], plain(cases[1])]
    for case, cache in zip(cases, result.caches, strict=True):
        assert distance(of_row(cache), clean(case)[cache.length]) < SAME


def test_snapshots_from_every_step_are_restored_to_the_bit(model, forced, small, monkeypatch):
    cases = [CASES["plain"], CASES["hot"]]
    forced(cases, lambda row, step: 3 * (step % 2 == row))
    places, settle = [], Rows.settle

    def spy(rows: Rows) -> None:
        settle(rows)
        for row, sequence in enumerate(rows.sequences):
            cache = rows.cache.select([row])
            cache.follower = rows.speculation.follower_of(row)
            contents = [of_row(cache), of_row(cache.follower.cache)]
            places.append((sequence.sampler.seed, cache.snapshot(), cache.position, cache.follower.followed, contents))

    monkeypatch.setattr(Rows, "settle", spy)
    result = run(model, cases, 24, 3)
    caches = {case.seed: cache for case, cache in zip(cases, result.caches, strict=True)}
    assert min(Counter(seed for seed, *_ in places).values()) > 6
    for seed, snapshot, place, followed, contents in [*places[::-1], *places[::2]]:
        cache = caches[seed]
        cache.restore(snapshot)
        assert (cache.position, cache.follower.followed) == (place, followed)
        own = [of_row(cache), of_row(cache.follower.cache)]
        assert [distance(a, b) for a, b in zip(own, contents, strict=True)] == [0] * 2


# --- without ---------------------------------------------------------------------------------------------------------


def test_without_drafts_each_token_takes_one_pass_of_one_row(model, monkeypatch):
    shapes, hidden = [], Model.hidden

    def spy(self, tokens, *args, **options):
        shapes.append((tokens.shape, options.get("stepwise", False)))
        return hidden(self, tokens, *args, **options)

    monkeypatch.setattr(Model, "hidden", spy)
    run(model, [PLAIN], 6)
    assert shapes == [((1, len(PLAIN.prompt)), False)] + [((1, 1), False)] * 5


# --- through generate, with a head that was trained ------------------------------------------------------------------

ASK = "What is 34 + 58?"
OPTIONS = {"greedy": {}, "hot": {"temp": 6.0, "seed": 5, "top_k": 20, "presence_penalty": 0.5, "max_tokens": 25}}


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


@pytest.mark.core(2)
@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.full), 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_generate_answers_as_without_drafts(name, depth, nano):
    told = {"mtp": "on", "mtp_depth": depth, **OPTIONS[name]}
    expected, result = generate(*nano, ASK, mtp="off", **OPTIONS[name]), generate(*nano, ASK, **told)
    assert (result.tokens, result.text, result.finish_reason) == (
        expected.tokens, expected.text, expected.finish_reason
    )  # fmt: skip
    assert result.mtp.accepted > 0


def test_a_batch_answers_as_without_drafts(nano):
    prompts = [ASK, "Hello", "The list says tom: 42, anna: 17, ben: 5. Which number has anna?"]
    plain, drafted = (batch_generate(*nano, prompts, mtp=mode) for mode in ("off", "on"))
    assert [result.tokens for result in drafted] == [result.tokens for result in plain]


@pytest.mark.core(2)
@pytest.mark.parametrize("begin", [3, 11, 20, 33, 45])
def test_a_stop_string_ends_an_answer_in_the_middle_of_drafts(begin, nano):
    stop = [generate(*nano, "Hello", mtp="off", enable_thinking=False).text[begin : begin + 2]]
    caches = [nano[0].make_cache() for _ in range(2)]
    results = [
        generate(*nano, "Hello", mtp=mode, cache=cache, stop=stop, enable_thinking=False)
        for mode, cache in zip(("off", "on"), caches, strict=True)
    ]
    assert (results[0].text, results[0].tokens) == (results[1].text, results[1].tokens)
    assert results[0].finish_reason == results[1].finish_reason == "stop"
    assert caches[0].row_lengths == caches[1].row_lengths
    assert distance(of_row(caches[1]), of_row(caches[0])) < SAME
    following = [generate(*nano, "And 5 + 5?", cache=cache, mtp="off").tokens for cache in caches]
    assert following[0] == following[1]
