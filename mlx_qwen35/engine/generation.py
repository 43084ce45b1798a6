"""The generation of answers to several prompts at once, and the result of each."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache, Snapshot
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, DraftStatistics, Speculation, attach
from mlx_qwen35.engine.encode import encode, refuse_idle_vision
from mlx_qwen35.engine.loop import decode
from mlx_qwen35.engine.options import Options, check_options
from mlx_qwen35.engine.plan import GenerationPlan, plan
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.memory import set_limits
from mlx_qwen35.machine.process import refuse_fork
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Messages, Processor
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.prompt.stream import Piece


@dataclass(frozen=True)
class Result:
    """One finished generation; str() is the answer.

    finish_reason: "stop" (an end token or a stop string), "length" (max_tokens or the end of the context), or
    "interrupted". in_reasoning: whether it ended inside the reasoning, without an answer. tokens: the generated ids,
    the end token included. vision_seconds: of the vision encoder. prompt_tps, generation_tps: tokens per second, from
    the encoded prompt to the first token, and after it. peak_memory: in GB (10^9 bytes), since the program started.
    mtp: the drafts.
    """

    text: str
    reasoning: str
    tokens: tuple[int, ...]
    finish_reason: str
    in_reasoning: bool
    prompt_tokens: int
    generation_tokens: int
    vision_seconds: float
    prompt_tps: float
    generation_tps: float
    peak_memory: float
    seed: int
    mtp: DraftStatistics

    def __str__(self) -> str:
        return self.text


class Generation:
    """The answers to several prompts, generated together. Iterate once for (row, piece); `results()` at any time.

    The caller may stop early: the results then hold the tokens so far, marked "interrupted".
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        prompts: Sequence[Prompt],
        options: Options,
        drafts: DraftPolicy | None = None,
    ):
        """drafts: the policy chosen when the first part of the prompt was prefilled."""
        self.model, self.processor, self.prompts = model, processor, list(prompts)
        self.cache: Cache = options.get("cache") or model.make_cache(len(self.prompts))
        if (self.cache.config, self.cache.dtype) != (model.config, model.dtype):
            raise InputError("option_invalid", "cache must come from make_cache() of this model; it is another model's")
        if self.cache.batch != len(self.prompts):
            raise InputError(
                "cache_batch_mismatch",
                f"the cache is for {self.cache.batch} rows, there are {len(self.prompts)} prompts",
            )
        self.plan: GenerationPlan = plan(options, model, processor.greedy, self.prompts, self.cache.row_lengths, drafts)
        self._drafts = self.plan.drafts
        for token in self.plan.samplings[0].logit_bias:
            if token >= processor.vocabulary:
                raise InputError(
                    "option_invalid", f"logit_bias must name tokens from 0 to {processor.vocabulary - 1}, got {token}"
                )
        self.progress = options.get("progress", lambda done, total: None)
        self._streams = [processor.text_stream(prompt.thinking, self.plan.stop) for prompt in self.prompts]
        self._tokens: list[list[int]] = [[] for _ in self.prompts]
        self._pieces: list[list[Piece]] = [[] for _ in self.prompts]
        self._reasons = ["interrupted"] * len(self.prompts)
        self._first = [0.0] * len(self.prompts)  # times of each row's first and last token
        self._last = [0.0] * len(self.prompts)
        self._start = time.perf_counter()
        self._vision_seconds = 0.0
        self._speculation: Speculation | None = None
        self.before: Snapshot | None = None  # to which the caller's cache returns after an error

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        """Run the loop, once."""
        try:
            yield from self._run()
        except InputError:
            if self.before is not None:
                self.cache.restore(self.before)
            raise

    def _run(self) -> Iterator[tuple[int, Piece]]:
        set_limits(self.model.memory_limit)
        arrived = time.perf_counter()
        rows = encode_media(self.model, self.prompts)
        self._start = time.perf_counter()
        self._vision_seconds = self._start - arrived if any(prompt.media for prompt in self.prompts) else 0.0
        total, done = sum(len(prompt.tokens) for prompt in self.prompts), 0

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.progress(done, total)

        positions = [n + len(prompt.tokens) for n, prompt in zip(self.cache.row_lengths, self.prompts, strict=True)]
        self._drafts = attach(self.model, self.cache, self._drafts)
        hidden = prefill(self.model, self.cache, rows, self.plan.prefill_step_size, count)
        del rows  # and with them the embeddings
        seeds = [self.plan.seed] * len(self.prompts)
        sampler = Sampler(self.plan.samplings, seeds, positions, self.processor.vocabulary)
        if self._drafts.depth:
            self._speculation = Speculation(self.model, self.cache, self._drafts)
        steps = decode(
            self.model, self.cache, hidden, sampler, self.plan.limits, self.processor.stop_ids,
            finished=lambda row: self._streams[row].stopped, speculation=self._speculation,
        )  # fmt: skip
        for step in steps:
            for row, token in enumerate(step):
                if token is not None:
                    yield from ((row, piece) for piece in self._take(row, token))

    def _take(self, row: int, token: int) -> list[Piece]:
        self._last[row] = time.perf_counter()
        self._first[row] = self._first[row] or self._last[row]
        self._tokens[row].append(token)
        stream = self._streams[row]
        ended = token in self.processor.stop_ids
        pieces = [] if ended else stream.add(token)
        if ended or stream.stopped:
            self._reasons[row] = "stop"
        elif len(self._tokens[row]) == self.plan.limits[row]:
            self._reasons[row] = "length"
        if self._reasons[row] != "interrupted":
            pieces += stream.finish()
        self._pieces[row] += pieces
        return pieces

    def results(self) -> list[Result]:
        return [self._result(row) for row in range(len(self.prompts))]

    def _result(self, row: int) -> Result:
        tokens, prompt = self._tokens[row], len(self.prompts[row].tokens)
        prefill_seconds, seconds = self._first[row] - self._start, self._last[row] - self._first[row]
        drafts = self._speculation
        return Result(
            text="".join(piece.text for piece in self._pieces[row] if not piece.reasoning),
            reasoning="".join(piece.text for piece in self._pieces[row] if piece.reasoning).strip(),
            tokens=tuple(tokens),
            finish_reason=self._reasons[row],
            in_reasoning=self._streams[row].reasoning,
            prompt_tokens=prompt,
            generation_tokens=len(tokens),
            vision_seconds=self._vision_seconds,
            prompt_tps=prompt / prefill_seconds if tokens else 0.0,
            generation_tps=(len(tokens) - 1) / seconds if seconds > 0 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            seed=self.plan.seed,
            mtp=drafts.statistics(row) if drafts else DraftStatistics(self._drafts.reason or "nothing was decoded"),
        )


def encode_media(model: Model, prompts: Sequence[Prompt]) -> list[PromptRow]:
    """The rows to prefill, with images and videos encoded. Unloads the vision encoder, unless it is to be kept."""
    media = [placed.media for prompt in prompts for placed in prompt.media]
    if not media:
        return [PromptRow(prompt.tokens) for prompt in prompts]
    if model.vision is None:
        raise InputError("vision_missing", "this model has no vision encoder: its prompts must be text")
    try:
        encoded = iter(model.vision.encode(media))
        rows = []
        for prompt in prompts:
            own = [next(encoded) for _ in prompt.media]
            embeddings = mx.concatenate(own) if len(own) > 1 else next(iter(own), None)
            rows.append(PromptRow(prompt.tokens, prompt.placeholders, embeddings))
        mx.eval([row.embeddings for row in rows if row.embeddings is not None])
    finally:
        model.vision.release()
    return rows


def start(
    model: Model, processor: Processor, prompts: Sequence[str | Sequence[int] | Messages], **options: Unpack[Options]
) -> Generation:
    """A Generation of these prompts, not begun: for callers that want both pieces and results."""
    refuse_fork()
    given = check_options(options)
    encoded = [encode(processor, prompt, given) for prompt in prompts]
    refuse_idle_vision(given, encoded)
    generation = Generation(model, processor, encoded, given)
    if "cache" in given:
        generation.before = generation.cache.snapshot()
    return generation


