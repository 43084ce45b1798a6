"""What a caller may ask of a generation, and what follows from it for a given prompt."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import mlx.core as mx
import numpy as np

from mlx_qwen35.budget.chunk import suitable_chunk
from mlx_qwen35.budget.plan import most_tokens
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, choose_drafts
from mlx_qwen35.engine.sampling import PRESETS, Preset, Sampling
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.preprocess import IMAGE_OPTIONS, VIDEO_OPTIONS, VISION_OPTIONS, VisionOptions
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Messages, Processor
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.values import is_whole, plain, shown


class Options(TypedDict, total=False):
    """Keyword options of generate, stream_generate and batch_generate; every one may be left out.

    max_tokens: most tokens to generate, reasoning included. Default: the preset's published length, or what context and
        memory have room for.
    preset: "thinking", "coding", "instruct" or "reasoning", the published sampling settings. Default: thinking when the
        prompt opens a thinking block, else instruct. A preset that is given also sets enable_thinking: thinking and
        coding are for answers with reasoning, instruct and reasoning for those without. Each value below overrides the
        preset's; temp 0 without a preset is plain greedy decoding, which is also the default of a checkpoint whose
        generation_config.json says so.
    temp, top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty, logit_bias: see Sampling.
    seed: 0 to 2**32 - 1; the same seed gives the same text. Default: a random one, reported in the result.
    stop: strings that end the answer; they are not part of it.
    enable_thinking: True or False as the chat template understands it. Default: the preset's, where
        one is given, else the template's own.
    system_prompt: put in front of a string prompt as the system message.
    tools: function descriptions for the chat template.
    images, videos: put in front of the text of a string prompt, images first; paths, URLs, PIL images, arrays, see
        read_image and read_video. With ignore_chat_template they go where the text has <|image_pad|> or <|video_pad|>.
        Messages hold theirs as parts, in any order, see Processor.encode_messages.
    min_pixels, max_pixels, fps, video_num_frames, video_total_pixels, source_fps, published_limits, outer_vision_tags,
        allow_private_urls: see VisionOptions; a part of a message may set some for itself.
    ignore_chat_template: take a string prompt as raw text to be completed. Control tokens in it, as <|im_start|>, are
        control tokens; in messages, tools and the system prompt they are ordinary text.
    mtp: "auto", "on" or "off", whether the checkpoint's draft head proposes tokens, which the model then checks several
        at a time. The text is the same. Default auto: as long as it is measured to be faster on this machine.
    mtp_depth: tokens it proposes at a time, 1 to 3; with auto, at most. Default: 2 when on, 3 when auto.
    prefill_step_size: tokens of the prompt read at a time. Default: what suits memory, context and chip, see chunk.py.
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
    images: Sequence[Any]
    videos: Sequence[Any]
    min_pixels: int
    max_pixels: int
    fps: float
    video_num_frames: int
    video_total_pixels: int
    source_fps: float
    published_limits: bool
    outer_vision_tags: bool
    allow_private_urls: bool
    ignore_chat_template: bool
    mtp: str
    mtp_depth: int
    prefill_step_size: int
    cache: Cache
    progress: Callable[[int, int], None]


SAMPLING = {field.name for field in fields(Sampling)}


def thinking_switch(options: Options) -> bool | None:
    """enable_thinking for the chat template: as given, or as the preset is meant; None: the template's own default."""
    given, preset = options.get("enable_thinking"), options.get("preset")
    meant = given if preset is None else PRESETS[preset].thinking
    if given not in (None, meant):
        raise InputError(
            "option_conflict",
            f"preset {preset} must not be given with enable_thinking {given}: it is for answers "
            f"{'with' if meant else 'without'} thinking, and sees to that itself. Leave one out",
        )
    return meant


def encode(processor: Processor, prompt: str | Sequence[int] | Messages, options: Options) -> Prompt:
    """A prompt in any of its forms -> tokens, and the images and clips that they show.

    A string is one user message put through the chat template, or raw text with ignore_chat_template; a list of
    integers is tokens as they are; a list of mappings is messages.
    """
    raw = options.get("ignore_chat_template")
    if isinstance(prompt, np.ndarray | mx.array):
        prompt = prompt.tolist()
    is_text = isinstance(prompt, str)
    if not isinstance(prompt, str | list | tuple):
        raise InputError(
            "prompt_invalid",
            f"a prompt must be text, a list of tokens or a list of messages, got {shown(prompt)}",
        )
    if (not is_text and not len(prompt)) or (is_text and not prompt.strip()):
        raise InputError("prompt_empty", "the prompt must not be empty")
    kind = "text" if is_text else "messages" if isinstance(prompt[0], Mapping) else "tokens"
    kind = "raw text" if is_text and raw else kind
    _refuse_idle(kind, options)
    template = {"enable_thinking": thinking_switch(options), "tools": options.get("tools")}
    media = {name: options.get(name, ()) for name in ("images", "videos")}
    vision = vision_options(options)
    if kind == "raw text":
        return processor.encode_text(prompt, **media, vision=vision)
    if kind == "text":
        return processor.encode_messages(_messages(prompt, options), vision, **template)
    if kind == "messages":
        return processor.encode_messages(prompt, vision, **template)
    tokens = [plain(token) for token in prompt]
    if wrong := [token for token in tokens if not is_whole(token) or not 0 <= token < processor.vocabulary]:
        raise InputError(
            "tokens_invalid", f"tokens must be integers from 0 to {processor.vocabulary - 1}, got {shown(wrong[0])}"
        )
    if found := sorted(processor.placeholder_ids & set(tokens)):
        raise InputError(
            "tokens_invalid", f"tokens must not stand for images ({found}): there is no image with them. Give messages"
        )
    return Prompt(tuple(tokens), processor.opens_thinking(tokens))


def _messages(text: str, options: Options) -> Messages:
    media = [("image", source) for source in options.get("images", ())]
    media += [("video", source) for source in options.get("videos", ())]
    return one_message(text, media, options.get("system_prompt"))


def one_message(text: str, media: Sequence[tuple[str, Any]], system: str | None) -> Messages:
    """One user message of images and clips, as pairs of kind and source, and text; behind the system's, if any."""
    parts = [{"type": kind, kind: source} for kind, source in media]
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


# Which options have an effect on a prompt of this kind, among those that have not on every kind.
_EFFECTIVE = {
    "text": {"system_prompt", "enable_thinking", "tools", "images", "videos"},
    "raw text": {"ignore_chat_template", "images", "videos"},
    "messages": {"enable_thinking", "tools"},
    "tokens": set(),
}


def _refuse_idle(kind: str, options: Options) -> None:
    """An option must not be without effect in silence."""
    given = {name for name in set().union(*_EFFECTIVE.values()) if name in options}
    given -= {name for name in ("ignore_chat_template", "images", "videos") if not options.get(name)}
    if idle := sorted(given - _EFFECTIVE[kind]):
        raise InputError(
            "option_no_effect", f"{', '.join(idle)} must not be given with a prompt of {kind}: it would have no effect"
        )


def vision_options(options: Mapping[str, Any]) -> VisionOptions:
    return VisionOptions(**{name: options[name] for name in VISION_OPTIONS if name in options})


def refuse_idle_vision(options: Options, prompts: Sequence[Prompt]) -> None:
    """Options for images need an image among the prompts, those for clips a clip."""
    clips = {placed.media.is_video for prompt in prompts for placed in prompt.media}
    for kind, names, present in (
        ("image", IMAGE_OPTIONS, False in clips), ("video", VIDEO_OPTIONS, True in clips),
        ("image or video", {"published_limits"}, bool(clips)),
    ):  # fmt: skip
        idle = sorted(name for name in names if options.get(name))
        if idle and not present:
            raise InputError(
                "option_no_effect", f"{', '.join(idle)} must not be given without {kind}: it would have no effect"
            )


@dataclass(frozen=True)
class Plan:
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
) -> Plan:
    """Fill in the defaults for these prompts. InputError when a prompt is too long, or drafts cannot be had.

    options: checked. drafts: what was chosen before.
    """
    presets = [_preset(options, prompt) for prompt in prompts]
    given = {key: value for key, value in options.items() if key in SAMPLING}
    plain = "preset" not in options and (options.get("temp") == 0 or (greedy and not given))
    contexts = [before + len(prompt.tokens) for prompt, before in zip(prompts, already_read, strict=True)]
    step = reading_step(options, model, contexts)
    wanted = _wanted(options, prompts)
    mode, depth = options.get("mtp", "auto"), options.get("mtp_depth")
    drafts = drafts or choose_drafts(model, mode, depth, len(prompts), max(wanted))
    without = most_tokens(model.config, model.dtype, step, max(already_read), len(prompts))
    memory = (max(already_read), len(prompts), drafts.depth, drafts.head_bytes)
    room = most_tokens(model.config, model.dtype, step, *memory) if drafts.depth else without
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
    return Plan(
        samplings=tuple(replace(Sampling(temp=0) if plain else preset.sampling, **given) for preset in presets),
        seed=options.get("seed", secrets.randbits(32)),
        limits=tuple(limits),
        stop=options.get("stop", ()),
        prefill_step_size=step,
        drafts=drafts,
    )


def _wanted(options: Options, prompts: Sequence[Prompt]) -> list[int]:
    """Most tokens of each answer, whatever there is room for."""
    return [options.get("max_tokens", _preset(options, prompt).max_tokens) for prompt in prompts]


def _check_room(options: Options, room: int, contexts: Sequence[int], drafts: DraftPolicy) -> None:
    """Refuse a prompt, or an answer whose length was asked for, whose keys and values memory has no room for."""
    rows = f" for each of {len(contexts)} prompts" if len(contexts) > 1 else ""
    wanted = max(contexts) + options.get("max_tokens", 1)
    if room < wanted:
        raise InputError(
            "memory_exceeded",
            f"memory has room for a context of {room:,} tokens{rows}; prompt and answer have {wanted:,}. Shorten the "
            "prompt, lower max_tokens, answer fewer prompts at once, choose a folder with fewer bits, "
            f"{'do without drafts (mtp auto or off), ' if drafts.fixed else ''}or raise memory_limit",
        )


def reading_step(options: Options, model: Model, contexts: Sequence[int]) -> int:
    """How many tokens of the prompts to read at a time, where each row will have a context of so many."""
    given = options.get("prefill_step_size")
    if given is None:
        return suitable_chunk(model.config, model.dtype, max(contexts), len(contexts))
    return given


def _preset(options: Options, prompt: Prompt) -> Preset:
    return PRESETS[options.get("preset", "thinking" if prompt.thinking else "instruct")]
