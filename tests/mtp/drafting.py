"""Decoding with drafts under control: guesses that are right as often as a test says, and depths that it chooses."""

import contextlib
import itertools
import json
from collections.abc import Callable, Collection
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from geometries import changed

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import FULL, LINEAR
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import is_matrix
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, Speculation, attach
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.load import load_model
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.piece import Piece
from mlx_qwen35.prompt.prompt import Prompt

SMALL = changed(
    geometry("tiny"), num_hidden_layers=3, layer_types=[LINEAR, FULL, LINEAR], hidden_size=128, intermediate_size=192,
    num_attention_heads=2, linear_num_key_heads=1, linear_num_value_heads=2, vocab_size=256,
)  # fmt: skip
VOCABULARY = 250  # of the 256 rows of the head, as if the rest were padding
SURE = 10  # by which the embedding is multiplied, so that logits differ by 2 and the noise alone decides nothing

Contents = dict[str, np.ndarray]


class Case(NamedTuple):
    """A prompt and how to answer it."""

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling(temp=1.0)
    seed: int = 0


def load_small(raw: Path, folder: Path, bits: int | None = None) -> Model:
    """The model of a random checkpoint, surer of itself, packed if bits are given; `folder` is written for it."""
    folder.mkdir()
    config, tensors = json.loads((raw / "config.json").read_text()), {}
    for file in raw.glob("*.safetensors"):
        tensors |= mx.load(str(file))
    tensors["model.language_model.embed_tokens.weight"] *= SURE
    if bits:
        config["quantization"] = {"group_size": 64, "bits": bits, "mode": "affine"}
        for name in [name for name, a in tensors.items() if ".language_model." in name and is_matrix(name, a.shape)]:
            parts = mx.quantize(tensors.pop(name), group_size=64, bits=bits)
            named = zip(("weight", "scales", "biases"), parts, strict=True)
            tensors |= {name.removesuffix("weight") + part: array for part, array in named}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    return load_model(open_checkpoint(folder), mx.float32, str(folder))


class Interrupt(KeyboardInterrupt):
    """Ctrl-C where a test wants it."""


class Run(NamedTuple):
    """What came of a generation."""

    sequences: list[Sequence]
    caches: list[Cache]  # of each row

    @property
    def tokens(self) -> list[list[int]]:
        return [sequence.tokens for sequence in self.sequences]

    @property
    def cache(self) -> Cache:
        """That of the only row."""
        (cache,) = self.caches
        return cache


def prompt(seed: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist())


class Ending:
    """A TextStream without text that ends its row after so many tokens, as a stop string does."""

    reasoning, calls, cut = False, (), None

    def __init__(self, count: int):
        self.left = count

    @property
    def stopped(self) -> bool:
        return self.left == 0

    def add(self, token: int) -> list[Piece]:
        self.left -= 1
        return []

    def finish(self, cut: bool = False) -> list[Piece]:
        return []


def run(
    model: Model,
    cases: Many[Case],
    limits: int | Many[int],
    depths: int | Many[int] = 0,
    *,
    cache: Cache | None = None,
    before: Callable[[Cache], Any] = lambda cache: None,
    most: int = 10**6,
    stop_ids: Collection[int] = (),
    ends: Many[int] = (),
) -> Run:
    """Answer the cases together. depths: 0 is plain decoding, else that many drafts, or a script of depths.

    cache: of a single case. before: called with a row's cache when its prompt is read. most: cancel all once a row has
    so many tokens. ends: of each row, after how many tokens it ends as by a stop string. An Interrupt ends the run like
    Ctrl-C.
    """
    limits = [limits] * len(cases) if isinstance(limits, int) else list(limits)
    caches = [cache] if cache else [model.make_cache() for _ in cases]
    script = itertools.repeat(depths) if isinstance(depths, int) else itertools.chain(
        depths, itertools.repeat(depths[-1])
    )  # fmt: skip
    drafts = DraftPolicy(depths if isinstance(depths, int) else max(depths), fixed=True)
    sequences: list[Sequence] = []
    for row, (case, limit, own) in enumerate(zip(cases, limits, caches, strict=True)):
        sampler = Sampler(case.sampling, case.seed, own.length + len(case.prompt), VOCABULARY)
        sequences.append(Sequence(
            Prompt(case.prompt, thinking=False), sampler, limit, prefill_step_size=1024, stop_ids=stop_ids,
            stream=Ending(ends[row]) if ends else None, cache=own, drafts=drafts,
            progress=lambda tokens, row=row: before(sequences[row].own),
        ))  # fmt: skip
    engine = Engine(model)
    engine.add(*sequences)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupt):
        patch.setattr(Speculation, "depth", lambda speculation: next(script))
        while not engine.idle:
            engine.step()
            if max(len(sequence.tokens) for sequence in sequences) >= most:
                for sequence in sequences:
                    engine.cancel(sequence)
    for sequence in sequences:
        if sequence.error:
            raise sequence.error
    return Run(sequences, caches)


Pattern = Callable[[int, int], int]  # (row, step) -> how many guesses, from the first, are right


def cycle(*numbers: int) -> Pattern:
    """The same for every row: these numbers in turn."""
    return lambda row, step: numbers[step % len(numbers)]


def force(
    monkeypatch: pytest.MonkeyPatch, cases: Many[Case], texts: Many[Many[int]], pattern: Pattern
) -> None:
    """Have the head propose what the texts say, and something else behind as many right ones as the pattern says.

    cases: of the texts, each with a seed of its own, by which its row is known. The first wrong guess is followed by
    right ones. The head itself is asked all the same, so that it reads what it would. Checks that a text goes on as it
    should.
    """
    propose, steps = Speculation.propose, itertools.count()
    rows = {case.seed: row for row, case in enumerate(cases)}
    assert len(rows) == len(cases)

    def forced(
        speculation: Speculation, tokens: mx.array, counts: Many[int], depth: int, samplers: Many[Sampler]
    ) -> mx.array:
        own, step = propose(speculation, tokens, counts, depth, samplers), next(steps)
        assert own.shape == (len(samplers), 1 + depth)
        guesses = np.array(own).astype(np.int32)
        for i, sampler in enumerate(samplers):
            row = rows[sampler.seed]
            text, done = texts[row], sampler.position - len(cases[row].prompt)
            if counts[i]:
                assert guesses[i, 0] == text[done - 1], (row, done)
            following = [*text[done : done + depth], *[0] * depth][:depth]
            right = pattern(row, step)
            guesses[i, 1:] = [token if j != right else (token + 1) % VOCABULARY for j, token in enumerate(following)]
        return mx.array(guesses)

    monkeypatch.setattr(Speculation, "propose", forced)


# --- what a cache holds ----------------------------------------------------------------------------------------------


def of_row(cache: Cache, row: int = 0) -> Contents:
    """What is remembered of a row: every array."""
    return {name: np.array(array[0]) for name, array in cache.arrays(row).items()}


def distance(a: Contents, b: Contents, only: Callable[[str], bool] = lambda name: True) -> float:
    """The largest difference of any array, relative to the largest number in it; infinite for other shapes."""
    assert a.keys() == b.keys()
    worst = 0.0
    for name in filter(only, a):
        if a[name].shape != b[name].shape or not np.isfinite(a[name]).all():
            return np.inf
        if a[name].size:
            worst = max(worst, float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()))
    return worst


def step_by_step(model: Model, case: Case, text: Many[int]) -> dict[int, Contents]:
    """What a cache holds that read the prompt, and then the text token by token, by the number of tokens read."""
    cache = model.make_cache()
    prefill(model, cache, PromptRow(case.prompt), 1024)
    found = {len(case.prompt): of_row(cache)}
    for token in text:
        mx.eval(model.hidden(mx.array([[token]]), cache))
        found[cache.length] = of_row(cache)
    return found


def head_after(model: Model, tokens: Many[int]) -> DraftFollower:
    """The head's memory of a text that was read at once."""
    cache = model.make_cache()
    attach(model, cache, DraftPolicy(1), cache)
    prefill(model, cache, PromptRow(tokens), 10**6)
    return cache.follower


def head_distance(model: Model, caches: Many[Cache], texts: Many[Many[int]]) -> float:
    """How far the head's memory is from one that read each row's text at once; what it collected is read first."""
    worst = 0.0
    for cache, tokens in zip(caches, texts, strict=True):
        clean, own = head_after(model, tokens), cache.follower
        own.flush(model)
        assert own.cache.row_lengths == clean.cache.row_lengths == [len(tokens) - 1]
        assert own.cache.next_positions == clean.cache.next_positions
        assert own.followed == (len(tokens),)
        waiting = ({"hidden": np.array(drafts.hidden[0])} for drafts in (own, clean))
        worst = max(worst, distance(of_row(own.cache), of_row(clean.cache)), distance(*waiting))
    return worst
