"""Prompts and options -> sequences, and a generation that runs them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Unpack

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.prefix import PrefixLibrary
from mlx_qwen35.engine.constraints.rules import Rules
from mlx_qwen35.engine.constraints.thinking import line_tokens
from mlx_qwen35.engine.encode import encode, prefix_of, refuse_idle_vision
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.logprobs import LogprobScorer
from mlx_qwen35.engine.options import Options, check_options
from mlx_qwen35.engine.plan import SequencePlan, plan
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.process import refuse_fork
from mlx_qwen35.model.lora import BASE
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.piece import Piece
from mlx_qwen35.prompt.processor import Messages, Processor
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.values import from_load

Given = str | Sequence[int] | Messages  # a prompt as generate takes it


def request(model: Model, processor: Processor, prompt: Given, **options: Unpack[Options]) -> Request:
    """A sequence for an engine. The prompt is text, tokens or messages; options are those of `generate`.

    Raises InputError for a prompt or an option that breaks a rule, and where memory has no room for it now.
    """
    return start(model, processor, [prompt], **options).requests[0]


def start(model: Model, processor: Processor, prompts: Sequence[Given], **options: Unpack[Options]) -> "Generation":
    """A Generation of these prompts, not begun: for callers that want both pieces and results."""
    refuse_fork()
    check_loaded(model, processor)
    given, encoded, rules = make_ready(processor, prompts, **options)
    adapters = adapters_of(given, model, len(prompts))
    caches = check_caches(given, model, adapters)
    cached = [cache.length if cache else 0 for cache in caches]
    plans = plan_rows(model, processor, encoded, adapters, cached, given, rules, check_library(given, model))
    requests: list[Request] = []
    count = _counter(given, requests)
    rows = zip(encoded, adapters, plans, caches, strict=True)
    seen = given.get("media_progress", lambda done, total: None)
    requests += [make_request(processor, *row, given, rules, progress=count, media_progress=seen) for row in rows]
    return Generation(model, requests)


def make_ready(
    processor: Processor, prompts: Sequence[Given], **options: Unpack[Options]
) -> tuple[Options, list[Prompt], Rules]:
    """Options checked, prompts encoded, grammars compiled. Any thread may, since nothing of it is MLX's."""
    given = check_options(options)
    if len(prompts) > 1 and "constraint" in given:
        raise InputError("option_conflict", "constraint holds a place in one answer: it must be given with one prompt")
    encoded = [encode(processor, prompt, given) for prompt in prompts]
    refuse_idle_vision(given, encoded)
    return given, encoded, Rules(processor, given)


def plan_rows(
    model: Model,
    processor: Processor,
    prompts: Sequence[Prompt],
    adapters: Sequence[str],
    cached: Sequence[int],
    options: Options,
    rules: Rules,
    library: PrefixLibrary | None,
) -> list[SequencePlan]:
    """The plans of prompts, cached[i] tokens before each, and the names of their adapters. A library that is in their
    way makes room.

    It is where memory would refuse a prompt, or shorten an answer or the drafts.
    """
    prefixes = [prefix_of(*own) for own in zip(prompts, adapters, strict=True)] if library else []

    def planned() -> list[SequencePlan]:
        held = library.ready(prefixes) if library else [0] * len(prompts)
        rest = [prompt.after(length) for prompt, length in zip(prompts, held, strict=True)]
        before = list(map(sum, zip(cached, held, strict=True)))
        return plan(options, model, processor.greedy, rest, before, rules.closing)

    try:
        plans = planned()
        if library is None or not any(plan.short for plan in plans):
            return plans
    except InputError as error:
        if library is None or error.code != "memory_exceeded":
            raise
    library.make_room(prefixes)
    return planned()


def check_loaded(model: Model, processor: Processor) -> None:
    """InputError unless these are a model and a processor, in this order."""
    from_load("model", model, Model)
    from_load("processor", processor, Processor)


def make_request(
    processor: Processor,
    prompt: Prompt,
    adapter: str,
    planned: SequencePlan,
    cache: Cache | None,
    options: Options,
    rules: Rules,
    *,
    progress: Callable[[int], None] = lambda tokens: None,
    media_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Request:
    """The sequence of an encoded prompt, the adapter that reads it, "" for none, and its plan.

    options: checked; for stop strings and the caller's functions. rules: of the same options.
    """
    sampler = Sampler(
        exempting(planned.sampling, processor), planned.seed, len(prompt.tokens), processor.vocabulary,
        processors=options.get("logits_processors", ()), choose=options.get("sampler"),
        door=rules.door(prompt, planned.thinking_budget, planned.limit), prompt=prompt.tokens,
    )  # fmt: skip
    scorer = None
    if options.get("logprobs"):
        scorer = LogprobScorer(options.get("top_logprobs", 0), processor.vocabulary, processor.token_bytes)
    return Request(
        prompt, sampler, planned.limit, planned.limited_by, prefill_step_size=planned.prefill_step_size,
        stop_ids=processor.stop_ids, stream=rules.stream(
            prompt, cache.length if cache else 0, planned.seed, tuple(options.get("stop", ()))
        ), cache=cache, library=options.get("library"),
        drafts=planned.drafts, progress=progress, media_progress=media_progress,
        loop_guard=bool(options.get("loop_guard")), scorer=scorer, one_call=options.get("parallel_tool_calls") is False,
        adapter=adapter,
    )  # fmt: skip


def exempting(sampling: Sampling, processor: Processor) -> Sampling:
    """The sampling, which names the tokens that XTC never excludes."""
    if not sampling.xtc_probability or sampling.xtc_special_tokens is not None:
        return sampling
    thought = () if processor.think_end is None else (processor.think_end,)
    return replace(sampling, xtc_special_tokens=(*sorted(processor.stop_ids), *thought, *line_tokens(processor)))


def adapters_of(options: Options, model: Model, rows: int) -> list[str]:
    """The adapter of each prompt, "" for none. InputError for one that is not loaded."""
    given = options.get("adapter")
    if isinstance(given, str | None):
        return [model.adapters.named(given)] * rows
    if len(given) != rows:
        raise InputError(
            "option_invalid",
            f"adapter must be one name, or one for each of {rows} {'prompts' if rows > 1 else 'prompt'}; there are "
            f"{len(given)}",
        )
    return [model.adapters.named(name) for name in given]


def check_caches(options: Options, model: Model, adapters: Sequence[str]) -> list[Cache | None]:
    """The cache that each prompt goes on with. InputError unless each has one of this model, of its adapter, and of its
    own.
    """
    given, rows = options.get("cache"), len(adapters)
    if given is None:
        return [None] * rows
    caches = [given] if isinstance(given, Cache) else list(given)
    if len(caches) != rows:
        raise InputError(
            "cache_batch_mismatch", f"each of {rows} prompts needs a cache, in a list; there are {len(caches)} caches"
        )
    if wrong := [cache.batch for cache in caches if cache.batch != 1]:
        raise InputError(
            "cache_batch_mismatch",
            f"a cache must have 1 row, as make_cache() gives it; got one of {wrong[0]}. Several prompts take a list",
        )
    if len({id(cache) for cache in caches}) < rows:
        raise InputError("cache_batch_mismatch", f"each of {rows} prompts needs a cache of its own; one is given twice")
    for cache in caches:
        if (cache.config, cache.dtype, cache.kv) != (model.held, model.dtype, model.kv):
            raise InputError(
                "option_invalid",
                f"cache must come from make_cache() of this model (form of keys and values: {model.kv.name}); it is "
                f"another model's (form: {cache.kv.name})",
            )
    for cache, adapter in zip(caches, adapters, strict=True):
        if cache.adapters != (adapter,):
            (own,) = cache.adapters
            raise InputError(
                "option_conflict",
                f"cache must be of the adapter that goes on with it, {adapter or BASE}; this one is of {own or BASE}. "
                f"Give adapter={own or BASE!r}, or begin with make_cache(adapter={adapter or BASE!r})",
            )
    return list(caches)


def check_library(options: Options, model: Model) -> PrefixLibrary | None:
    """The library of the options. InputError for another model's, and beside a cache."""
    library = options.get("library")
    if library and options.get("cache") is not None:
        raise InputError(
            "option_conflict", "library must not be given with cache, whose tokens stand before the prompt as they are"
        )
    if library and library.model is not model:
        raise InputError("option_invalid", "library must come from make_library() of this model; it is another model's")
    return library


def _counter(options: Options, requests: Sequence[Request]) -> Callable[[int], None]:
    """Counts prefilled tokens of requests, and tells the caller of them."""
    done, progress = 0, options.get("progress", lambda done, total: None)

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, sum(request.unread for request in requests))

    return count


class Generation:
    """The answers to several prompts, generated together. Iterate once for (row, piece); `results()` at any time.

    The caller may stop early: the results then hold the tokens so far, marked "interrupted". Where all prompts fail,
    the first one's error is raised in the end; where some do, the error is in the result.
    """

    def __init__(self, model: Model, requests: Sequence[Request]):
        self.model, self.requests = model, list(requests)
        self._begun = False

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        if self._begun:
            raise InputError("generation_spent", "a generation runs once; its results() remain. Start another")
        self._begun = True
        return self._run()

    def _run(self) -> Iterator[tuple[int, Piece]]:
        engine, rows = Engine(self.model), {id(request): row for row, request in enumerate(self.requests)}
        try:
            engine.add(*self.requests)
            while not engine.idle:
                for request in engine.step():
                    yield from ((rows[id(request)], piece) for piece in request.pieces())
        finally:
            for request in self.requests:
                engine.cancel(request)
        errors = [request.error for request in self.requests if request.error]
        if len(errors) == len(self.requests):
            raise errors[0]

    def results(self) -> list[Result]:
        return [request.result() for request in self.requests]
