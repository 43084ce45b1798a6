"""How well a model finds a number in a long text: by the length of the text and the depth of the number in it."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import mlx.core as mx

from mlx_qwen35.bench.haystack import Haystack, Needle, needles, written
from mlx_qwen35.checkpoint.rope_fields import wider
from mlx_qwen35.console.progress import Step
from mlx_qwen35.engine.generation import request
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.errors import InputError
from mlx_qwen35.generate import generate
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.processor import Processor

KINDS = ("single", "several", "chain")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWER = 32  # most tokens of an answer
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answer:
    """One question and what the model said."""

    kind: str
    length: int  # tokens that the prompt was to have
    tokens: int  # that it has
    depth: float
    round: int
    number: int
    said: str
    seconds: float  # for all questions of its text

    @property
    def right(self) -> bool:
        """Whether the number is in the answer."""
        return str(self.number) in re.findall(r"\d+", self.said)


def measure(model: Model, processor: Processor, lengths: Sequence[int], rounds: int) -> Iterator[list[Answer]]:
    """The answers at every depth, for each kind and length, in so many rounds of texts that differ. Progress is shown.

    InputError, before anything is read, for a length that window or memory has no room for, or that is too short.
    """
    least = max(_least(processor, kind, round) for kind in KINDS for round in range(rounds))
    for length in lengths:
        _check(model, processor, length, least)
    return (
        _round(model, processor, kind, length, round, rounds)
        for length in lengths
        for round in range(rounds)
        for kind in KINDS
    )


def _least(processor: Processor, kind: str, round: int) -> int:
    """Tokens of the longest prompt of a round with nothing between its needles."""
    haystack = _haystack(processor, round)
    return max(len(prompt) for text in _texts(kind, round) for prompt in _filled(processor, haystack, text, 0))


def _check(model: Model, processor: Processor, length: int, least: int) -> None:
    if length < least:
        raise InputError("option_invalid", f"--needle must have {least} tokens or more, got {length}")
    window = model.config.max_position_embeddings
    if length + ANSWER > window:
        scaling = wider(model.config.rope, window, length + ANSWER)
        raise InputError(
            "context_length_exceeded",
            f"--needle must leave {ANSWER} tokens for an answer in the context of {window:,} tokens, so at most "
            f"{window - ANSWER:,} fit; got {length:,}"
            + (f". {spelled('rope_scaling', scaling)} widens the context" if scaling else ""),
        )
    request(model, processor, [0] * length, max_tokens=ANSWER, mtp="off")


def _round(model: Model, processor: Processor, kind: str, length: int, round: int, rounds: int) -> list[Answer]:
    haystack, texts = _haystack(processor, round), _texts(kind, round)
    asked = [needle for text in texts for needle in text]
    prompts = [prompt for text in texts for prompt in _prompts(processor, haystack, text, length)]
    order = sorted(range(len(asked)), key=lambda i: -asked[i].depth)  # each shares the most with the one before
    began = time.perf_counter()
    with Step(f"{kind}, {length:,} tokens, round {round + 1} of {rounds}", "tokens", timed=True) as step:
        said = answers(model, processor, [prompts[i] for i in order], step)
    seconds = time.perf_counter() - began
    return [
        Answer(kind, length, len(prompts[i]), asked[i].depth, round, asked[i].number, text, seconds)
        for i, text in sorted(zip(order, said, strict=True))
    ]


def _haystack(processor: Processor, round: int) -> Haystack:
    return Haystack(round, lambda text: len(processor.tokenizer.encode(text)))


def _texts(kind: str, round: int) -> list[list[Needle]]:
    return needles(Random(f"{kind} {round}"), kind, DEPTHS)


def _prompts(processor: Processor, haystack: Haystack, text: Sequence[Needle], length: int) -> list[tuple[int, ...]]:
    """A prompt for each needle of a text: the text, and the question. The longest has `length` tokens, or few less."""
    room = length - max(map(len, _filled(processor, haystack, text, 0)))
    # Lines may join to more tokens than they have alone.
    while max(map(len, found := _filled(processor, haystack, text, room))) > length:
        room -= max(map(len, found)) - length
    return found


def _filled(processor: Processor, haystack: Haystack, text: Sequence[Needle], room: int) -> list[tuple[int, ...]]:
    """The same, with `room` tokens between the needles."""
    filled = written(haystack.fill(room), text)
    messages = [[{"role": "user", "content": f"{filled} {needle.question}"}] for needle in text]
    return [processor.encode_messages(one, VisionOptions(), enable_thinking=False).tokens for one in messages]


def answers(
    model: Model, processor: Processor, prompts: Sequence[Sequence[int]], progress: Progress = lambda done, total: None
) -> list[str]:
    """The greedy answer to each prompt. What a prompt shares with the one before it is read once.

    progress: called with the tokens that were read, and all that must be.
    """
    shared = [0, *(common(*pair) for pair in pairwise(prompts))]
    total = sum(len(prompt) - held for prompt, held in zip(prompts, shared, strict=True))
    chunk = request(model, processor, max(prompts, key=len), max_tokens=ANSWER, mtp="off").prefill_step_size
    cache, done, said = model.make_cache(), 0, []
    places = {0: cache.snapshot()}

    def count(tokens: int) -> None:
        nonlocal done
        progress(done := done + tokens, total)

    for i, (prompt, held) in enumerate(zip(prompts, shared, strict=True)):
        places = {length: place for length, place in places.items() if length <= held}
        cache.restore(places[held])
        for end in sorted({common(prompt, later) for later in prompts[i + 1 :]}):
            if end > cache.length:
                prefill(model, cache, PromptRow(prompt[cache.length : end]), chunk, count)
                places[end] = cache.snapshot()
        rest = prompt[cache.length :]
        said.append(generate(model, processor, rest, cache=cache, temp=0, max_tokens=ANSWER, mtp="off").text)
        count(len(rest))
    mx.clear_cache()
    return said


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
