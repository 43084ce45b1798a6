"""What the options of a generation mean for given prompts: every default filled in."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_qwen35.budget.chunk import suitable_chunk
from mlx_qwen35.budget.plan import most_tokens
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, choose_drafts
from mlx_qwen35.engine.options import Options, sampling_options
from mlx_qwen35.engine.presets import PRESETS, Preset, Sampling
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.prompt import Prompt


@dataclass(frozen=True)
class GenerationPlan:
    """The options of one generation, every default filled in."""

    samplings: tuple[Sampling, ...]  # of each row
    seed: int
    limits: tuple[int, ...]  # most tokens of each row
    stop: tuple[str, ...]
    prefill_step_size: int
    drafts: DraftPolicy


def plan(
    options: Options,
    model: Model,
    greedy: bool,
    prompts: Sequence[Prompt],
    already_read: Sequence[int],
    drafts: DraftPolicy | None = None,
) -> GenerationPlan:
    """Fill in the defaults for these prompts. InputError when a prompt is too long, or drafts cannot be had.

    options: checked. drafts: what was chosen before.
    """
    presets = [_preset(options, prompt) for prompt in prompts]
    given = sampling_options(options)
    plain = "preset" not in options and (options.get("temp") == 0 or (greedy and not given))
    contexts = [before + len(prompt.tokens) for prompt, before in zip(prompts, already_read, strict=True)]
    step = reading_step(options, model, contexts)
    wanted = _wanted(options, prompts)
    mode, depth = options.get("mtp", "auto"), options.get("mtp_depth")
    drafts = drafts or choose_drafts(model, mode, depth, len(prompts), max(wanted))
    without = most_tokens(model.config, model.dtype, model.memory_limit, step, max(already_read), len(prompts))
    memory = (max(already_read), len(prompts), drafts.depth, drafts.head_bytes)
    room = most_tokens(model.config, model.dtype, model.memory_limit, step, *memory) if drafts.depth else without
    if not drafts.fixed and room < min(without, max(contexts) + max(wanted)):
        drafts, room = DraftPolicy(0, reason="memory has no room for drafts beside this context"), without
    _check_room(options, room, contexts, drafts)
    limits = []
    for most, context in zip(wanted, contexts, strict=True):
        left = model.config.max_position_embeddings - context
        if left < 1:
            raise InputError(
                "context_length_exceeded",
                "a prompt must leave room for an answer in the context of "
                f"{model.config.max_position_embeddings} tokens; this one has {context}. Shorten it",
            )
        limits.append(max(1, min(most, left, room - max(contexts))))
    return GenerationPlan(
        samplings=tuple(replace(Sampling(temp=0) if plain else preset.sampling, **given) for preset in presets),
        seed=options.get("seed", secrets.randbits(32)),
        limits=tuple(limits),
        stop=tuple(options.get("stop", ())),
        prefill_step_size=step,
        drafts=drafts,
    )


def _wanted(options: Options, prompts: Sequence[Prompt]) -> list[int]:
    """Most tokens of each answer, whatever there is room for."""
    return [options.get("max_tokens", _preset(options, prompt).max_tokens) for prompt in prompts]


def _check_room(options: Options, room: int, contexts: Sequence[int], drafts: DraftPolicy) -> None:
    """Refuse a prompt, or an answer whose length was asked for, whose keys and values memory has no room for."""
    rows = f" for each of {len(contexts)} prompts" if len(contexts) > 1 else ""
    wanted, mtp = max(contexts) + options.get("max_tokens", 1), spelled("mtp")
    if room < wanted:
        raise InputError(
            "memory_exceeded",
            f"memory has room for a context of {room:,} tokens{rows}; prompt and answer have {wanted:,}. Shorten the "
            f"prompt, lower {spelled('max_tokens')}, answer fewer prompts at once, choose a folder with fewer bits, "
            f"{f'do without drafts ({mtp} auto or off), ' if drafts.fixed else ''}or raise {spelled('memory_limit')}",
        )


def reading_step(options: Options, model: Model, contexts: Sequence[int]) -> int:
    """Prompt tokens of a prefill chunk, where each row will have a context of so many."""
    given = options.get("prefill_step_size")
    return given or suitable_chunk(model.config, model.dtype, model.memory_limit, max(contexts), len(contexts))


def _preset(options: Options, prompt: Prompt) -> Preset:
    return PRESETS[options.get("preset", "thinking" if prompt.thinking else "instruct")]
