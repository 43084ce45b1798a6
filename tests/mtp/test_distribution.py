"""With drafts a token is drawn from the processed distribution, whatever is guessed; looking ahead takes nothing.

The distribution is tested on a chain: the logits depend on the last token alone, so all texts can be enumerated.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.engine import sampling as engine_sampler
from mlx_qwen35.engine.distribution import process
from mlx_qwen35.engine.drafts.speculate import Speculation
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler, commit, peek, sample
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.model.lora import AdapterSet
from mlx_qwen35.prompt.prompt import Prompt

SAMPLINGS = {
    "plain": Sampling(),
    "every processor": Sampling(1.3, 3, 0.97, 0.02, 0.6, 0.3, 1.2, {1: 0.5, 3: 0.2}),
    "penalties": Sampling(0.7, presence_penalty=-0.5, frequency_penalty=0.8, repetition_penalty=1.3),
}
REST = ["plain", "penalties"]

# --- what is drawn ---------------------------------------------------------------------------------------------------

VOCABULARY = 4  # and one row of padding
LENGTH = 4  # tokens of a text
TEXTS = 800
LEAST = 5  # expected texts of a cell; rarer ones are counted together
DOUBTFUL = 1e-4

TABLE = mx.array(np.random.default_rng(0).normal(0, 1.2, (VOCABULARY, VOCABULARY + 1)).astype(np.float32))
OTHER = mx.array(np.random.default_rng(1).normal(0, 1.2, (VOCABULARY, VOCABULARY + 1)).astype(np.float32))


class Chain:
    """A model whose hidden state is the last token."""

    config = replace(parse_config(geometry("tiny")).text, layer_types=())
    dtype, memory_limit, vision, mtp, adapters = mx.float32, 1 << 40, None, None, AdapterSet(mx.float32)

    def make_cache(self, adapter: str | None = None) -> Cache:
        return Cache(self.config, self.dtype)

    def hidden(self, tokens: mx.array, cache: Cache, lengths: Many[int] | None = None, *_, **__) -> mx.array:
        with cache.forward(tokens.shape[1], lengths):
            return tokens[..., None].astype(mx.float32)

    def active(self, cache: Cache) -> None:
        """No row has an adapter."""

    def logits(self, hidden: mx.array, adapters: None = None) -> mx.array:
        return TABLE[hidden[..., 0].astype(mx.int32)]


class Credulous(Chain):
    """Its first token behind a guess is the guess."""

    def logits(self, hidden: mx.array, adapters: None = None) -> mx.array:
        logits = super().logits(hidden)
        if hidden.ndim < 3 or hidden.shape[1] == 1:
            return logits
        guess = mx.where(mx.arange(VOCABULARY + 1) == hidden[:, 1], 100.0, 0.0)
        return mx.concatenate([guess[:, None], logits[:, 1:]], axis=1)


def likeliest(tokens: mx.array, drafted: list[mx.array], samplers: Many[Sampler]) -> mx.array:
    return mx.argmax(TABLE[tokens][..., :VOCABULARY], axis=-1)


def another_model_s(tokens: mx.array, drafted: list[mx.array], samplers: Many[Sampler]) -> mx.array:
    """Drawn with the noise of the token, as the draft head's are."""
    return peek(samplers, OTHER[tokens], mx.concatenate(drafted, axis=1) if drafted else None, drafting=True)


def blind(tokens: mx.array, drafted: list[mx.array], samplers: Many[Sampler]) -> mx.array:
    return (tokens * 3 + 1 + len(drafted)) % VOCABULARY


class Guesses:
    """Proposes what a rule says, in the place of the draft head."""

    def __init__(self, rule: Callable, depth: int):
        self.rule, self.most = rule, depth
        self.accepted = self.drafted = 0

    def propose(self, tokens: mx.array, counts, depth: int, samplers: Many[Sampler]) -> mx.array:
        drafted: list[mx.array] = []
        for _ in range(depth):
            drafted.append(self.rule(drafted[-1] if drafted else tokens, drafted, samplers))
        return mx.concatenate([tokens, *drafted], axis=1)

    def record(self, lengths, tokens, paused) -> None:
        self.drafted += sum(n - 1 for n, found in zip(lengths, tokens, strict=True) if n and found)
        self.accepted += sum(len(found) - 1 for n, found in zip(lengths, tokens, strict=True) if n and found)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Speculation, "depth", lambda _: self.most)
            patch.setattr(Speculation, "most", lambda _, row, depth: depth)
            patch.setattr(Speculation, "propose", lambda _, *given: self.propose(*given))
            patch.setattr(Speculation, "record", lambda _, *given: self.record(*given))
            yield


def texts(sampling: Sampling, guesses: Guesses | None, model: Chain | None = None) -> list[tuple[int, ...]]:
    """What TEXTS seeds answer to token 0."""
    engine, zero = Engine(model or Chain()), Prompt((0,), thinking=False)
    samplers = [Sampler(sampling, seed, 1, VOCABULARY) for seed in range(TEXTS)]
    sequences = [Sequence(zero, sampler, LENGTH, prefill_step_size=1) for sampler in samplers]
    engine.add(*sequences)
    with guesses.in_place() if guesses else nullcontext():
        while not engine.idle:
            engine.step()
    assert {sequence.finish_reason for sequence in sequences} == {"length"}
    return [tuple(sequence.tokens) for sequence in sequences]


def probabilities(sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Of every text, from the processed distribution of each of its tokens."""
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        begun = list(known)
        counts = mx.array([[own.count(token) for token in range(VOCABULARY + 1)] for own in begun], mx.float32)
        last = mx.array([own[-1] if own else 0 for own in begun])
        chances = np.array(mx.exp(process(TABLE[last], sampling, counts, VOCABULARY)), np.float64)
        pairs = itertools.product(enumerate(begun), range(VOCABULARY))
        known = {(*own, token): known[own] * chances[i, token] for (i, own), token in pairs}
    assert math.isclose(sum(known.values()), 1, rel_tol=1e-5)
    return known


def chance(found: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of a chi-square as large as that of the texts found (Wilson and Hilferty's approximation); 0 for one that cannot
    be."""
    counted, cells = Counter(found), [[0.0, 0.0]]
    for text, p in expected.items():
        if p == 0 and counted[text]:
            return 0.0
        if p * len(found) < LEAST:
            cells[0][0] += counted[text]
            cells[0][1] += p * len(found)
        else:
            cells.append([counted[text], p * len(found)])
    cells = [cell for cell in cells if cell[1] > 0]
    degrees = len(cells) - 1
    value = sum((n - mean) ** 2 / mean for n, mean in cells)
    spread = 2 / (9 * degrees)
    return 0.5 * math.erfc(((value / degrees) ** (1 / 3) - 1 + spread) / math.sqrt(2 * spread))


def test_the_chance_of_a_chi_square_is_that_of_tables():
    """5 %, 1 % and 0.1 % of 1, 10 and 30 degrees of freedom."""
    for degrees, value, p in ((1, 3.841, 0.05), (10, 18.307, 0.05), (10, 29.588, 0.001), (30, 50.892, 0.01)):
        cells = {(token,): 1 / (degrees + 1) for token in range(degrees + 1)}
        n, off = 10**6 * (degrees + 1), math.sqrt(value * 10**6 / 2)
        counted = {(0,): 10**6 + round(off), (1,): 10**6 - round(off)}
        found = _Counted({**{cell: 10**6 for cell in cells}, **counted}, n)
        assert chance(found, cells) == pytest.approx(p, rel=0.15)


class _Counted(dict):
    """Counts of texts that look like a list of them."""

    def __init__(self, counts, n):
        super().__init__(counts)
        self.n = n

    def __len__(self) -> int:
        return self.n


@pytest.mark.core(1)
@pytest.mark.parametrize("rule", [likeliest, another_model_s, blind])
@pytest.mark.parametrize("name", ["every processor", *(pytest.param(n, marks=pytest.mark.full) for n in REST)])
def test_texts_with_drafts_follow_the_processed_distribution(name, rule):
    guesses = Guesses(rule, 3)
    found = texts(SAMPLINGS[name], guesses)
    assert chance(found, probabilities(SAMPLINGS[name])) > DOUBTFUL
    assert 0 < guesses.accepted < guesses.drafted


@pytest.mark.full
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("depth", [1, 2])
def test_each_seed_has_its_text_whatever_is_guessed(depth, name):
    assert texts(SAMPLINGS[name], Guesses(blind, depth)) == texts(SAMPLINGS[name], None)


@pytest.mark.full
@pytest.mark.parametrize("name", ["every processor", *(pytest.param(n, marks=pytest.mark.full) for n in REST)])
def test_a_guess_that_is_accepted_though_it_was_not_drawn_would_be_noticed(name):
    found = texts(SAMPLINGS[name], Guesses(blind, 3), Credulous())
    assert chance(found, probabilities(SAMPLINGS[name])) < DOUBTFUL


# --- looking ahead ---------------------------------------------------------------------------------------------------

V = 40
MORE = SAMPLINGS | {
    "greedy": Sampling(temp=0),
    "greedy with penalties": Sampling(temp=0, presence_penalty=1.0, repetition_penalty=1.5),
    "a few": Sampling(temp=0.4, top_k=2, frequency_penalty=2.0),
}
ROWS = {name: [sampling] * 3 for name, sampling in MORE.items()} | {"one each": list(MORE.values())[1:4]}
SEEDS, PLACES, N = [3, 4, 3], [7, 9, 100], 4


def ahead(name: str) -> list[Sampler]:
    """Of three rows, each of which has drawn tokens before."""
    samplers = rows(ROWS[name])
    for i in range(2):
        sample(samplers, columns(50 + i, 1)[:, 0])
    return samplers


def rows(samplings: Many[Sampling], vocabulary: int = V - 1) -> list[Sampler]:
    return [Sampler(*given, vocabulary) for given in zip(samplings, SEEDS, PLACES, strict=True)]


def columns(seed: int, n: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 1, (3, n, V)).astype(np.float32))


def one_by_one(samplers: Many[Sampler], logits: mx.array) -> mx.array:
    return mx.stack([sample(samplers, logits[:, i]) for i in range(logits.shape[1])], axis=1)


def state(samplers: Many[Sampler]) -> list[tuple]:
    return [(s.position, None if s.counts is None else s.counts.tolist()) for s in samplers]


@pytest.mark.parametrize("name", ROWS)
def test_a_look_behind_drafts_gives_what_would_be_drawn_one_by_one(name):
    logits = columns(0, N)
    drawn = one_by_one(ahead(name), logits)
    assert peek(ahead(name), logits, drawn[:, :-1]).tolist() == drawn.tolist()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("m", range(N))
def test_a_look_at_one_column_stands_behind_all_drafts(m, name):
    logits = columns(1, N)
    drawn = one_by_one(ahead(name), logits)
    drafted = drawn[:, :m] if m else None
    assert peek(ahead(name), logits[:, m : m + 1], drafted).tolist() == drawn[:, m : m + 1].tolist()


@pytest.mark.parametrize("name", ROWS)
def test_a_draft_that_was_not_drawn_counts_for_what_is_behind_it(name):
    """As if it had been the token."""
    logits, drafted = columns(2, 2), mx.array([[5], [6], [7]])
    samplers = ahead(name)
    first = peek(samplers, logits[:, :1])
    commit(samplers, drafted)
    both = mx.concatenate([first, peek(samplers, logits[:, 1:])], axis=1)
    assert peek(ahead(name), logits, drafted).tolist() == both.tolist()


@pytest.mark.parametrize("name", ROWS)
def test_a_look_takes_nothing(name):
    logits, samplers = columns(3, N), ahead(name)
    before = state(samplers)
    drafted = peek(samplers, logits[:, :1])
    peek(samplers, logits[:, :2], drafted)
    assert state(samplers) == before
    assert one_by_one(samplers, logits).tolist() == one_by_one(ahead(name), logits).tolist()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("counts", [[4, 4, 4], [1, 0, 3], [0, 0, 0], [2, 4, 1]], ids=str)
def test_a_row_goes_on_behind_the_tokens_that_it_took(counts, name):
    logits, following, samplers = columns(4, N), columns(5, 2), ahead(name)
    drawn = one_by_one(ahead(name), logits)
    commit(samplers, peek(samplers, logits, drawn[:, :-1]), counts)
    after = one_by_one(samplers, following)
    for row, count in enumerate(counts):
        alone = rows(ROWS[name])[row : row + 1]
        for part in (columns(50, 1), columns(51, 1), logits[:, :count]):
            one_by_one(alone, part[row : row + 1]) if part.shape[1] else None
        assert one_by_one(alone, following[row : row + 1]).tolist() == after[row : row + 1].tolist()
        assert state(alone) == state(samplers[row : row + 1])


def test_noise_is_made_once_for_a_draft_and_its_token(monkeypatch):
    made, noise = [], engine_sampler.noise
    monkeypatch.setattr(engine_sampler, "noise", lambda *key: made.append(key) or noise(*key))
    logits, samplers = columns(6, N), rows([Sampling()] * 3, V)
    drafted = peek(samplers, logits[:, :1])
    commit(samplers, peek(samplers, logits[:, :2], drafted), [1, 2, 1])
    peek(samplers, logits[:, :2], drafted)
    assert len(made) == len(set(made)) == 3 * 2 + 4
