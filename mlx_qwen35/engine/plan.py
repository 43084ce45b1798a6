"""What the options of a generation mean for given prompts: every default filled in."""

import functools
import secrets
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_qwen35.budget.plan import Machine, kv_bytes, most_tokens, this_machine
from mlx_qwen35.cache.kv_format import KVFormat
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.rope_fields import Yarn, wider
from mlx_qwen35.engine.constraints.thinking import budget_of, check_thinking
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, choose_drafts
from mlx_qwen35.engine.options import Options, draft_options, sampling_options
from mlx_qwen35.engine.presets import MOST_SEED, PRESETS, Preset, Sampling
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import either, spelled
from mlx_qwen35.prompt.prompt import Prompt


@dataclass(frozen=True)
class SequencePlan:
    """The options of one sequence, every default filled in."""

    sampling: Sampling
    seed: int
    limit: int  # most tokens of the answer
    limited_by: str  # what sets it: "max_tokens", "context" or "memory"
    thinking_budget: int | None  # most tokens of thinking; None: no budget
    prefill_step_size: int
    drafts: DraftPolicy

    @property
    def short(self) -> bool:
        """Whether memory shortens the answer or the drafts."""
        return self.limited_by == "memory" or self.drafts.short


def plan(
    options: Options,
    model: Model,
    greedy: bool,
    prompts: Sequence[Prompt],
    cached: Sequence[int],
    closing: Sequence[int],
) -> list[SequencePlan]:
    """Fill in the defaults for prompts that are answered together.

    InputError when a prompt is too long, drafts cannot be had, or a thinking budget leaves no room for an answer.

    options: checked. greedy: what the checkpoint advises. cached: tokens in the cache of each, before its prompt.
    closing: the tokens that close thinking.
    """
    contexts = [before + len(prompt.tokens) for prompt, before in zip(prompts, cached, strict=True)]
    check_prompts(options, model.config, prompts, contexts)
    chunk = options.get("prefill_step_size") or model.chunk(max(contexts))
    drafts, room = _drafts_and_room(options, model, chunk, contexts, cached, _wanted(options, prompts))
    plans = fill_in(options, model.config, greedy, prompts, contexts, closing, room=room)
    return [replace(own, prefill_step_size=chunk, drafts=drafts) for own in plans]


def check_prompts(
    options: Options, config: TextConfig, prompts: Sequence[Prompt], contexts: Sequence[int], window: int | None = None
) -> None:
    """InputError for a prompt that is too long, or has nothing to think about; see `fill_in`."""
    check_thinking(options, prompts)
    for row, (prompt, context) in enumerate(zip(prompts, contexts, strict=True), start=1):
        check_window(config, context, prompt, f"prompt {row}" if len(prompts) > 1 else "this one", window=window)


def fill_in(
    options: Options,
    config: TextConfig,
    greedy: bool,
    prompts: Sequence[Prompt],
    contexts: Sequence[int],
    closing: Sequence[int],
    *,
    window: int | None = None,
    room: int = sys.maxsize,
) -> list[SequencePlan]:
    """Every default that depends on no memory: here a chunk is a whole prompt, and nothing is drafted.

    contexts: tokens of each prompt with those before it. window: most tokens of a prompt and its answer; None: the
    model's. room: most tokens of an answer by memory.
    """
    window = min(config.max_position_embeddings, window or sys.maxsize)
    given = sampling_options(options)
    plain = "preset" not in options and (options.get("temp") == 0 or (greedy and not given))
    samplings = [Sampling(temp=0) if plain else _preset(options, prompt).sampling for prompt in prompts]
    wanted = zip(_wanted(options, prompts), contexts, strict=True)
    limits = [_limit(n, window - context, room) for n, context in wanted]
    yarn = config.rope.yarn
    if yarn and max(context + limit for context, (limit, _) in zip(contexts, limits, strict=True)) <= yarn.original:
        warn_of_idle_yarn(yarn)
    seeds = _seeds(options, len(prompts))
    thinking = zip(prompts, limits, strict=True)
    budgets = [budget_of(options, limit, len(closing)) if prompt.thinking else None for prompt, (limit, _) in thinking]
    rows = zip(samplings, seeds, limits, budgets, contexts, strict=True)
    return [
        SequencePlan(replace(own, **given), seed, *limit, budget, context, DraftPolicy(0))
        for own, seed, limit, budget, context in rows
    ]


def _wanted(options: Options, prompts: Sequence[Prompt]) -> list[int]:
    """The most tokens of each answer, as far as the options say."""
    return [options.get("max_tokens", _preset(options, prompt).max_tokens) for prompt in prompts]


def check_window(
    config: TextConfig, context: int, prompt: Prompt, what: str, remedy: str = "Shorten it", window: int | None = None
) -> None:
    """InputError where a context leaves no token for an answer.

    context: tokens of the prompt and of what it goes on with. what: who has them, in the message. window: most tokens
    of a prompt and its answer, if fewer than the model's.
    """
    own = config.max_position_embeddings
    window = min(own, window or own)
    if context < window:
        return
    seen = sum(p.stop - p.start for p in prompt.placeholders)
    shown = f", {seen:,} of them of images and videos" if seen else ""
    ways = [remedy] + [f"show less of each image with a lower {spelled('max_pixels')}"] * bool(seen)
    if window == own and (scaling := wider(config.rope, window, context + 1)):
        ways.append(f"widen the context with {spelled('rope_scaling', scaling)}")
    raise InputError(
        "context_length_exceeded",
        f"a prompt must leave room for an answer in the context of {window:,} tokens, so at most {window - 1:,} fit; "
        f"{what} has {context:,}{shown}. {either(ways)}",
    )


def _limit(wanted: int, left: int, room: int) -> tuple[int, str]:
    """The most tokens of an answer, and what sets them. left: tokens of the window. room: by memory."""
    limits = (wanted, "max_tokens"), (left, "context"), (room, "memory")
    return min(limits, key=lambda limit: limit[0])


@functools.cache
def warn_of_idle_yarn(yarn: Yarn) -> None:
    """Once: YaRN is static, so that it touches what is read within the original length too."""
    warnings.warn(
        f"positions are scaled by YaRN (factor {yarn.factor:g}), which changes answers to short texts too; prompt and "
        f"answer fit the {yarn.original:,} tokens of training without it: {spelled('rope_scaling', 'none')}",
        UserWarning,
        stacklevel=2,
    )


def _seeds(options: Options, rows: int) -> list[int]:
    """The seed of each row. Of a single seed that is given, row i has seed + i."""
    given = options.get("seed", secrets.randbits(32))
    if isinstance(given, int):
        return [(given + row) % (MOST_SEED + 1) for row in range(rows)]
    if len(given) != rows:
        raise InputError(
            "option_invalid",
            f"seed must be one number, or one for each of {rows} {'prompts' if rows > 1 else 'prompt'}; there are "
            f"{len(given)}",
        )
    return list(given)


def _drafts_and_room(
    options: Options,
    model: Model,
    chunk: int,
    contexts: Sequence[int],
    cached: Sequence[int],
    wanted: Sequence[int],
) -> tuple[DraftPolicy, int]:
    """The drafts, and how many tokens each answer may have by memory."""
    rows = len(contexts)
    mode, depth = draft_options(options)
    drafts = choose_drafts(model, mode, depth, rows, max(wanted))
    machine = this_machine(model.held, model.dtype, model.memory_limit, model.kv)
    without = min(model.room, most_tokens(model.held, machine, chunk, cached))
    room = min(model.room, most_tokens(model.held, machine, chunk, cached, drafts.depth, drafts.head_bytes))
    needed = sum(contexts) + sum(wanted)
    if drafts.depth and not drafts.fixed and room < min(without, needed):
        drafts, room = DraftPolicy(0, reason="memory has no room for drafts beside this context", short=True), without
    answer = (room - sum(contexts)) // rows
    if answer < options.get("max_tokens", 1):
        smaller = _smaller_forms(model.held, machine, chunk, cached, drafts, room)
        refuse_memory(options, room, contexts, drafts, smaller)
    return drafts, answer


def _smaller_forms(
    config: TextConfig, machine: Machine, chunk: int, cached: Sequence[int], drafts: DraftPolicy, room: int
) -> dict[str, int]:
    """Form of keys and values with fewer bits -> the tokens that memory would have room for in it, if more than `room`.

    What the caches hold now would be in that form too.
    """
    held = kv_bytes(config, sum(cached), machine.dtype.size, kv=machine.kv)
    found = {}
    for form in machine.kv.smaller(config.head_dim):
        other = replace(machine, kv=KVFormat.of(form, machine.kv.rotate), limit=machine.limit + held)
        tokens = most_tokens(config, other, chunk, [0] * len(cached), drafts.depth, drafts.head_bytes)
        tokens = min(tokens, len(cached) * config.max_position_embeddings)
        if tokens > room:
            found[form] = tokens
    return found


def refuse_memory(
    options: Options, room: int, contexts: Sequence[int], drafts: DraftPolicy, smaller: Mapping[str, int]
) -> None:
    """InputError for a prompt, or an answer whose length was asked for, whose keys and values memory has no room for.

    smaller: of `_smaller_forms`.
    """
    rows = len(contexts)
    together = f" for {rows} prompts together" if rows > 1 else ""
    wanted, mtp = sum(contexts) + rows * options.get("max_tokens", 1), spelled("mtp")
    forms = ", ".join(f"{tokens:,} with {spelled('kv_bits', form)}" for form, tokens in smaller.items())
    raise InputError(
        "memory_exceeded",
        f"memory has room for a context of {room:,} tokens{together}; prompt and answer have {wanted:,}. "
        f"{f'Loaded with fewer bits for keys and values it would have room for {forms}. ' if forms else ''}Shorten the "
        f"prompt, lower {spelled('max_tokens')}, answer fewer prompts at once, choose a folder with fewer bits, "
        f"{f'do without drafts ({mtp} auto or off), ' if drafts.fixed else ''}or raise {spelled('memory_limit')}",
    )


def _preset(options: Options, prompt: Prompt) -> Preset:
    return PRESETS[options.get("preset", "thinking" if prompt.thinking else "instruct")]
