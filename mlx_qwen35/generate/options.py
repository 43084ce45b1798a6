"""What a caller may ask of a generation, and what follows from it for a given prompt."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from mlx_qwen35.cache import Cache
from mlx_qwen35.config import TextConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.processor import Messages, Processor, Prompt, check_stop
from mlx_qwen35.sampling import PRESETS, Preset, Sampling, check_seed

PREFILL_STEP = 1024  # tokens of the prompt read at a time


class Options(TypedDict, total=False):
    """Keyword options of generate, stream_generate and batch_generate; every one may be left out.

    max_tokens: most tokens to generate, reasoning included. Default: the preset's published length, or the space left.
    preset: "thinking", "coding", "instruct" or "reasoning", the published sampling settings. Default: thinking when the
        prompt opens a thinking block, else instruct. Each value below overrides the preset's; temp 0 without a preset
        is plain greedy decoding, which is also the default of a checkpoint whose generation_config.json says so.
    temp, top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty, logit_bias: see Sampling.
    seed: 0 to 2**32 - 1; the same seed gives the same text. Default: a random one, reported in the result.
    stop: strings that end the answer; they are not part of it.
    enable_thinking: True or False as the chat template understands it. Default: the template's own.
    system_prompt: put in front of a string prompt as the system message.
    tools: function descriptions for the chat template.
    ignore_chat_template: take a string prompt as raw text to be completed.
    prefill_step_size: tokens of the prompt read at a time.
    cache: continue this conversation (from model.make_cache()): the prompt is read after what is in it. Afterwards the
        cache has read every generated token, except the last one where max_tokens ended the generation.
    progress: called as progress(tokens_read, tokens_in_all) while the prompt is read.
    """

    max_tokens: int
    preset: str
    temp: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: Sequence[str]
    enable_thinking: bool
    system_prompt: str
    tools: Sequence[Mapping[str, Any]]
    ignore_chat_template: bool
    prefill_step_size: int
    cache: Cache
    progress: Callable[[int, int], None]


_SAMPLING = {field.name for field in fields(Sampling)}


def check_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, those that are None left out. TypeError for a name that is none."""
    if unknown := sorted(set(options) - set(Options.__annotations__)):
        raise TypeError(f"options must be among {', '.join(Options.__annotations__)}; got {', '.join(unknown)}")
    return {name: value for name, value in options.items() if value is not None}


def encode(processor: Processor, prompt: str | Sequence[int] | Messages, options: Options) -> Prompt:
    """A prompt in any of its forms -> tokens.

    A string is one user message put through the chat template, or raw text with ignore_chat_template; a list of
    integers is tokens as they are; a list of mappings is messages.
    """
    template = {"enable_thinking": options.get("enable_thinking"), "tools": options.get("tools")}
    raw, system = options.get("ignore_chat_template"), options.get("system_prompt")
    is_text = isinstance(prompt, str)
    if (not is_text and not len(prompt)) or (is_text and not prompt.strip()):
        raise InputError("the prompt must not be empty")
    if not is_text or raw:  # an option must not be without effect in silence
        unused = {"system_prompt": system, "ignore_chat_template": (not is_text and raw) or None}
        unused |= template if raw or (not is_text and isinstance(prompt[0], int)) else {}
        if names := [name for name, value in unused.items() if value is not None]:
            kind = "raw text" if is_text else "tokens" if isinstance(prompt[0], int) else "messages"
            raise InputError(f"{', '.join(names)} must not be given with a prompt of {kind}: it would have no effect")
    if is_text and raw:
        return processor.encode_text(prompt)
    if is_text:
        messages = [{"role": "system", "content": system}] if system else []
        return processor.encode_messages([*messages, {"role": "user", "content": prompt}], **template)
    if isinstance(prompt[0], Mapping):
        return processor.encode_messages(prompt, **template)
    if not all(isinstance(token, int) and 0 <= token < processor.vocabulary for token in prompt):
        raise InputError(f"tokens must be integers from 0 to {processor.vocabulary - 1}")
    return Prompt(tuple(prompt), processor.opens_thinking(prompt))


@dataclass(frozen=True)
class Plan:
    """The options of one generation, every default filled in."""

    samplings: tuple[Sampling, ...]  # of each row
    seed: int
    limits: tuple[int, ...]  # most tokens of each row
    stop: tuple[str, ...]
    prefill_step_size: int

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if type(self.prefill_step_size) is not int or self.prefill_step_size < 1:
            raise InputError(f"prefill_step_size must be at least 1, got {self.prefill_step_size}")


def plan(
    options: Options, config: TextConfig, greedy: bool, prompts: Sequence[Prompt], already_read: Sequence[int]
) -> Plan:
    """Fill in the defaults for these prompts. InputError when a value breaks its rule or a prompt is too long."""
    presets = [_preset(options, prompt) for prompt in prompts]
    given = {key: value for key, value in options.items() if key in _SAMPLING}
    plain = "preset" not in options and (options.get("temp") == 0 or (greedy and not given))
    limits = []
    for preset, prompt, before in zip(presets, prompts, already_read, strict=True):
        most = options.get("max_tokens", preset.max_tokens)
        if type(most) is not int or most < 1:
            raise InputError(f"max_tokens must be at least 1, got {most}")
        left = config.max_position_embeddings - before - len(prompt.tokens)
        if left < 1:
            raise InputError(
                f"a prompt must leave room for an answer in the context of {config.max_position_embeddings} tokens; "
                f"this one has {before + len(prompt.tokens)}. Shorten it"
            )
        limits.append(min(most, left))
    return Plan(
        samplings=tuple(replace(Sampling(temp=0) if plain else preset.sampling, **given) for preset in presets),
        seed=options.get("seed", secrets.randbits(32)),
        limits=tuple(limits),
        stop=check_stop(options.get("stop", ())),
        prefill_step_size=options.get("prefill_step_size", PREFILL_STEP),
    )


def _preset(options: Options, prompt: Prompt) -> Preset:
    name = options.get("preset", "thinking" if prompt.thinking else "instruct")
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
