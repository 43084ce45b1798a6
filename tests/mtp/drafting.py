"""Decoding with drafts under control: guesses that are right as often as a test says, and depths that it chooses."""

import json
from collections.abc import Callable, Sequence
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
from mlx_qwen35.engine.loop import decode
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.load import load_model
from mlx_qwen35.model.model import Model

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

    tokens: list[list[int]]  # of each row
    cache: Cache
    speculation: Speculation | None


def prompt(seed: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist())


class Script:
    """DepthControl from a list, the last one for ever; in the place of generate.depth.DepthControl."""

    def __init__(self, depths: Sequence[int]):
        self.left, self.told = list(depths), []

    def next(self) -> int:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]

    def record(
        self, depth: int, seconds: float, drafted: Sequence[int], accepted: Sequence[int], lasting: bool
    ) -> None:
        self.told.append((depth, list(drafted), list(accepted)))


def run(
    model: Model,
    cases: Sequence[Case],
    limits: int | Sequence[int],
    depths: int | Sequence[int] = 0,
    cache: Cache | None = None,
    before: Callable[[Cache], Any] = lambda cache: None,
    most: int = 10**6,
    **options: Any,
) -> Run:
    """Answer the cases together. depths: 0 is plain decoding, else that many drafts, or a script of depths.

    before: called with the cache when the prompts are read. most: close the generator once it has yielded so often.
    options: stop_ids, finished, of decode. An Interrupt ends the run like Ctrl-C.
    """
    cache = cache or model.make_cache(len(cases))
    limits = [limits] * len(cases) if isinstance(limits, int) else list(limits)
    deepest = depths if isinstance(depths, int) else max(depths)
    start = [n + len(case.prompt) for n, case in zip(cache.row_lengths, cases, strict=True)]
    attach(model, cache, DraftPolicy(deepest, fixed=True))
    hidden = prefill(model, cache, [PromptRow(case.prompt) for case in cases], 1024)
    before(cache)
    sampler = Sampler([case.sampling for case in cases], [case.seed for case in cases], start, VOCABULARY)
    speculation = Speculation(model, cache, DraftPolicy(deepest, fixed=True)) if deepest else None
    if not isinstance(depths, int):
        speculation.depths = Script(depths)
    tokens: list[list[int]] = [[] for _ in cases]
    steps = decode(model, cache, hidden, sampler, limits, speculation=speculation, **{"stop_ids": (), **options})
    try:
        for count, step in enumerate(steps, 1):
            for own, token in zip(tokens, step, strict=True):
                own.extend([] if token is None else [token])
            if count == most:
                steps.close()
    except Interrupt:
        pass
    return Run(tokens, cache, speculation)


Pattern = Callable[[int, int], int]  # (row, step) -> how many guesses, from the first, are right


def cycle(*numbers: int) -> Pattern:
    """The same for every row: these numbers in turn."""
    return lambda row, step: numbers[step % len(numbers)]


def force(
    monkeypatch: pytest.MonkeyPatch, begins: Sequence[int], texts: Sequence[Sequence[int]], pattern: Pattern
) -> None:
    """Have the head propose what the texts say, and something else behind as many right ones as the pattern says.

    begins: tokens each row has read before its text. The first wrong guess is followed by right ones. The head itself
    is asked all the same, so that it reads what it would. Checks that a text goes on as it should.
    """
    propose, steps = DraftFollower.propose, iter(range(10**6))

    def forced(
        drafts: DraftFollower, model: Model, tokens: mx.array, counts: Sequence[int], depth: int, draw: Callable
    ) -> mx.array:
        own, step = propose(drafts, model, tokens, counts, depth, draw), next(steps)
        assert own.shape == (len(texts), depth)
        guesses = np.zeros(own.shape, np.int32)
        for row, text in enumerate(texts):
            done = drafts.followed[row] - begins[row]
            if counts[row]:
                assert tokens[row].item() == text[done], (row, done)
            following = [*text[done + 1 : done + 1 + depth], *[0] * depth][:depth]
            right = pattern(row, step)
            guesses[row] = [token if j != right else (token + 1) % VOCABULARY for j, token in enumerate(following)]
        return mx.array(guesses)

    monkeypatch.setattr(DraftFollower, "propose", forced)


# --- what a cache holds ----------------------------------------------------------------------------------------------


def of_row(cache: Cache, row: int = 0) -> Contents:
    """What is remembered of a row: every array without its holes."""
    columns = slice(None) if cache.mask is None else np.array(cache.mask[row])
    found = {name: np.array(array[row]) for name, array in cache.arrays().items() if name != "mask"}
    return {name: a[:, columns] if name.endswith((".keys", ".values")) else a for name, a in found.items()}


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


def step_by_step(model: Model, case: Case, text: Sequence[int]) -> dict[int, Contents]:
    """What a cache holds that read the prompt, and then the text token by token, by the number of tokens read."""
    cache = model.make_cache()
    prefill(model, cache, [PromptRow(case.prompt)], 1024)
    found = {len(case.prompt): of_row(cache)}
    for token in text:
        mx.eval(model.hidden(mx.array([[token]]), cache))
        found[cache.length] = of_row(cache)
    return found


def head_after(model: Model, tokens: Sequence[int]) -> DraftFollower:
    """The head's memory of a text that was read at once."""
    cache = model.make_cache()
    attach(model, cache, DraftPolicy(1))
    prefill(model, cache, [PromptRow(tokens)], 10**6)
    return cache.follower


def head_distance(model: Model, cache: Cache, texts: Sequence[Sequence[int]]) -> float:
    """How far the head's memory is from one that read each row's text at once; what it collected is read first."""
    cache.follower.flush(model)
    worst = 0.0
    for row, tokens in enumerate(texts):
        clean, own = head_after(model, tokens), cache.follower
        assert own.cache.row_lengths[row] == clean.cache.row_lengths[0] == len(tokens) - 1
        assert own.cache.next_positions[row] == clean.cache.next_positions[0]
        assert own.followed[row] == len(tokens)
        waiting = ({"hidden": np.array(drafts.hidden[i])} for drafts, i in ((own, row), (clean, 0)))
        worst = max(worst, distance(of_row(own.cache, row), of_row(clean.cache)), distance(*waiting))
    return worst
