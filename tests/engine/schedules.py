"""Random schedules of sequences that join and leave an engine, and what each sequence gives alone."""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import numpy as np

from mlx_qwen35.engine.constraints.door import Door, Thinking
from mlx_qwen35.engine.drafts.speculate import DraftPolicy
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.prompt import Prompt

VOCABULARY = 250
SAMPLINGS = (
    Sampling(temp=0),
    Sampling(temp=1.0),
    Sampling(temp=0.8, top_k=20, top_p=0.9, min_p=0.01, xtc_probability=0.5),
    Sampling(temp=1.0, presence_penalty=1.5, frequency_penalty=0.3, repetition_penalty=1.2),
    Sampling(temp=1.0, logit_bias={3: 2.0, 5: -4.0}),
)
THINK = (30, 31)  # tokens that open and close thinking


class Even:
    """A constraint: even tokens at even places, odd ones at odd places."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> np.ndarray:
        return np.arange(VOCABULARY) % 2 == len(self.taken) % 2

    def accept(self, token: int) -> None:
        assert token % 2 == len(self.taken) % 2
        self.taken.append(token)

    def rollback(self, count: int) -> None:
        del self.taken[len(self.taken) - count :]


@dataclass(frozen=True)
class Case:
    """A sequence of a schedule."""

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    limit: int
    depth: int  # of drafts, 0: none
    stop_ids: frozenset[int]
    constrained: bool
    chunk: int
    arrives: int  # before this step of the engine
    leaves: int | None  # cancelled before this step; None: it runs to its end
    budget: int | None = None  # of thinking, in which it begins
    answered: bool = False  # behind thinking the answer is restricted
    adapter: str = ""  # "": none

    def door(self) -> Door | None:
        if self.constrained:
            return Door(VOCABULARY, everywhere=Even())
        if self.budget is None:
            return None
        rules = Thinking(*THINK, self.budget, 100, (9, 8, THINK[1], 7), (THINK[1], 7), (7,), guard=False, tools=None)
        answer = Even() if self.answered else None
        return Door(VOCABULARY, stops=self.stop_ids, thinking=rules, inside=True, answer=answer)

    def sequence(self) -> Sequence:
        door = self.door()
        sampler = Sampler(self.sampling, self.seed, len(self.prompt), VOCABULARY, door=door)
        return Sequence(
            Prompt(self.prompt, thinking=False), sampler, self.limit, prefill_step_size=self.chunk,
            stop_ids=self.stop_ids, drafts=DraftPolicy(self.depth, fixed=bool(self.depth)), adapter=self.adapter,
        )  # fmt: skip


def random_cases(seed: int, drafts: bool = True, adapters: Many[str] = ("",)) -> list[Case]:
    rng, thinking, choosing = (np.random.default_rng(own) for own in (seed, [seed, 1], [seed, 2]))
    cases = []
    for _ in range(rng.integers(2, 7)):
        arrives = int(rng.integers(0, 20))
        cases.append(
            Case(
                prompt=tuple(rng.integers(0, VOCABULARY, rng.integers(1, 30)).tolist()),
                sampling=SAMPLINGS[rng.integers(len(SAMPLINGS))],
                seed=int(rng.integers(2**32)),
                limit=int(rng.integers(1, 25)),
                depth=int(rng.integers(0, 4)) if drafts else 0,
                stop_ids=frozenset(rng.integers(0, VOCABULARY, 4).tolist()),
                constrained=bool(rng.random() < 0.2),
                chunk=int(rng.choice([3, 8, 64])),
                arrives=arrives,
                leaves=arrives + int(rng.integers(1, 20)) if rng.random() < 0.3 else None,
                budget=int(thinking.integers(0, 9)) if thinking.random() < 0.4 else None,
                answered=bool(thinking.random() < 0.5),
                adapter=str(choosing.choice(adapters)),
            )
        )
    return cases


def alone(model: Model, case: Case) -> list[int]:
    """The tokens of a case alone and without drafts."""
    engine, sequence = Engine(model), replace(case, depth=0).sequence()
    engine.add(sequence)
    while not engine.idle:
        engine.step()
    assert sequence.error is None, sequence.error
    return sequence.tokens


def together(
    model: Model, cases: Many[Case], interleave: bool, engine: Callable[..., Engine] = Engine
) -> list[Sequence]:
    """Run a schedule to its end."""
    engine, sequences, step = engine(model, interleave=interleave), [case.sequence() for case in cases], 0
    while step <= max(case.arrives for case in cases) or not engine.idle:
        for case, sequence in zip(cases, sequences, strict=True):
            if case.arrives == step:
                engine.add(sequence)
            if case.leaves == step:
                engine.cancel(sequence)
        engine.step()
        step += 1
    return sequences


def check(model: Model, seed: int, adapters: Many[str] = ("",)) -> None:
    """InputError and assertions apart, every sequence has what it has alone, or a beginning of it. adapters: of whom
    each has one.
    """
    cases = random_cases(seed, seed % 4 > 1, adapters)
    for case, sequence in zip(cases, together(model, cases, interleave=bool(seed % 2)), strict=True):
        assert sequence.error is None, (seed, sequence.error)
        expected = alone(model, case)
        if sequence.finish_reason == "interrupted":
            assert case.leaves is not None
            assert sequence.tokens == expected[: len(sequence.tokens)], (seed, case)
        else:
            assert sequence.tokens == expected, (seed, case)
