"""What a caller may ask of a generation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.prefix import PrefixLibrary
from mlx_qwen35.engine.constraints.calls import read_tools
from mlx_qwen35.engine.constraints.constraint import Constraint
from mlx_qwen35.engine.constraints.forms import (
    a_regex,
    a_response_format,
    a_schema,
    a_tool_choice,
    choices,
    read_schema,
    read_tool_list,
)
from mlx_qwen35.engine.drafts.speculate import MODES, MOST_DEPTH, ON_DEPTH
from mlx_qwen35.engine.presets import MOST_SEED, PRESETS, Sampling
from mlx_qwen35.engine.sampling import Choice, Processor
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.options import VISION_OPTIONS, VisionOptions
from mlx_qwen35.media.pdf import check_pages
from mlx_qwen35.model.lora import BASE
from mlx_qwen35.options import check_keywords, listed, option, options_of, spelled
from mlx_qwen35.prompt.messages import check_tools
from mlx_qwen35.values import shown, whole


def _a_list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise InputError(
            "option_invalid",
            f"{name} must be a list, got {type(value).__name__}; for one write {name}=[{name[:-1]}]",
        )
    return value


def _a_cache(name: str, value: Any) -> Cache | Sequence[Cache]:
    several = isinstance(value, list | tuple)
    if not all(isinstance(cache, Cache) for cache in (value if several else [value])):
        raise InputError(
            "option_invalid",
            f"{name} must come from model.make_cache(), for several prompts a list with one for each; got "
            f"{shown(value)}",
        )
    return value


def _a_seed(name: str, value: Any) -> int | list[int]:
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray | mx.array) and value.ndim):
        return [whole(name, seed, 0, MOST_SEED) for seed in value]
    return whole(name, value, 0, MOST_SEED)


def _an_adapter(name: str, value: Any) -> str | list[str | None]:
    several = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(own, str) and own for own in several if own is not None or several is value):
        raise InputError(
            "option_invalid",
            f"{name} must be the name of a loaded adapter, or {BASE!r}, or for several prompts a list of them; "
            f"got {shown(value)}",
        )
    return value if isinstance(value, str) else several


def _a_sampler(name: str, value: Any) -> Choice:
    if not callable(value):
        raise InputError("option_invalid", f"{name} must be a function of log-probabilities (1, V), got {shown(value)}")
    return value


def _processors(name: str, value: Any) -> list[Processor]:
    if not isinstance(value, list | tuple) or not all(map(callable, value)):
        raise InputError(
            "option_invalid", f"{name} must be a list of functions of tokens (n,) and logits (1, V), got {shown(value)}"
        )
    return list(value)


def _a_tool_list(name: str, value: Any) -> Sequence[Mapping[str, Any]]:
    check_tools(value)
    return value


def _a_constraint(name: str, value: Any) -> Constraint:
    if not all(callable(getattr(value, method, None)) for method in ("mask", "accept", "rollback")):
        raise InputError(
            "option_invalid", f"{name} must have the methods mask, accept and rollback, got {shown(value)}"
        )
    return value


def _a_library(name: str, value: Any) -> PrefixLibrary:
    if not isinstance(value, PrefixLibrary):
        raise InputError("option_invalid", f"{name} must be a PrefixLibrary, got {shown(value)}")
    return value


def _a_function(name: str, value: Any) -> Callable[[int, int], object]:
    if not callable(value):
        raise InputError("option_invalid", f"{name} must be a function of two counts, got {shown(value)}")
    return value


def _stop_strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) and text for text in value):
        raise InputError("option_invalid", f"{name} must be a list of strings that are not empty, got {shown(value)}")
    return tuple(value)


@dataclass(frozen=True)
class PromptOptions:
    """How a prompt is made of text or messages."""

    images: Sequence[Any] | None = option(
        help="images put before the message, in the order given: files, URLs or data: URIs",
        check=_a_list, flag="image", each=True, metavar="FILE", prompts=("text", "raw text"),
    )  # fmt: skip
    videos: Sequence[Any] | None = option(
        help="videos put before the message, in the order given: files, URLs or folders of images",
        check=_a_list, flag="video", each=True, metavar="FILE", prompts=("text", "raw text"),
    )  # fmt: skip
    pdfs: Sequence[Any] | None = option(
        help="PDF documents put before the message, in the order given, an image for each page: files, URLs or data: "
        "URIs", check=_a_list, flag="pdf", each=True, metavar="FILE", prompts=("text",),
    )  # fmt: skip
    pages: str | None = option(
        help="pages of each PDF, as 1-3,7,9- (default: all)", check=check_pages, metavar="PAGES", prompts=("text",)
    )
    ignore_chat_template: bool | None = option(
        False, help="complete the prompt as raw text, control tokens included", prompts=("raw text",)
    )
    system_prompt: str | None = option(
        help="system message put before the conversation", aliases=("system",), metavar="TEXT", prompts=("text",)
    )
    enable_thinking: bool | None = option(
        help="think before answering, or answer at once (default: the preset's, else the chat template's)",
        prompts=("text", "messages"),
    )
    tools: Sequence[Mapping[str, Any]] | None = option(
        help="functions that the answer may call: a list of mappings, on the command line its text or a JSON file",
        read=read_tool_list, check=_a_tool_list, metavar="FILE|TEXT", prompts=("text", "messages"),
    )  # fmt: skip
    preserve_thinking: bool | None = option(
        help="keep the reasoning of earlier turns in the prompt, where the chat template has this switch",
        prompts=("text", "messages"),
    )
    continue_final_message: bool | None = option(
        False, help="go on with the last message, an assistant's, in place of a new one", python_only=True,
        prompts=("messages",),
    )  # fmt: skip


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated."""

    max_tokens: int | None = option(
        help="most tokens to generate, thinking included (default: the preset's length, as far as context and memory "
        "allow)", least=1, aliases=("m",), metavar="N",
    )  # fmt: skip
    stop: Sequence[str] | None = option(
        help="end the answer before this text; may be repeated; reasoning is not searched",
        check=_stop_strings, each=True, metavar="TEXT",
    )  # fmt: skip
    preset: str | None = option(
        help="published sampling settings, which also turn thinking on or off: "
        + ", ".join(f"{name} ({preset.use})" for name, preset in PRESETS.items())
        + "; default: thinking or instruct, as the prompt is made",
        choices=tuple(PRESETS),
    )
    seed: int | None = option(
        help="the same seed gives the same text, alone or in a batch; of several prompts, row i has seed + i, or its "
        "own in a list (default: a random one)", least=0, most=MOST_SEED, check=_a_seed, metavar="N",
    )  # fmt: skip
    adapter: str | Sequence[str | None] | None = option(
        help="the loaded adapter that reads and answers, by its name, or base for none; of several prompts one for "
        "all, or a list (default: the one that load was given without a name, else none)", check=_an_adapter,
        python_only=True,
    )  # fmt: skip
    mtp: str | None = option(
        help="draft tokens with the checkpoint's multi-token prediction head; the text is the same (default: auto, "
        "which drafts while it is measured to be faster)", choices=MODES,
    )  # fmt: skip
    mtp_depth: int | None = option(
        help=f"tokens drafted for a step, with auto at most (default: {ON_DEPTH} with on, {MOST_DEPTH} with auto)",
        least=1, most=MOST_DEPTH, metavar="N",
    )  # fmt: skip
    thinking_budget: int | None = option(
        help="most tokens of thinking: then it is closed, and the answer has the rest, at least 256 tokens", least=0,
        metavar="N",
    )  # fmt: skip
    reasoning_effort: str | None = option(
        help="a thinking budget by name, cut to what max_tokens leaves room for: none (no thinking), minimal (1,024 "
        "tokens), low (4,096), medium (16,384), high (no budget)", choices=("none", "minimal", "low", "medium", "high"),
    )  # fmt: skip
    loop_guard: bool | None = option(False, help="end thinking, or the answer, that repeats itself without end")
    tool_choice: str | Mapping[str, Any] | None = option(
        help="none: no calls; auto: as the model likes (default with tools); required: at least one call; a function's "
        "name: a call of it", check=a_tool_choice, metavar="WORD",
    )  # fmt: skip
    parallel_tool_calls: bool | None = option(
        True, help="whether an answer may hold several calls (the default); off, it ends behind the first"
    )
    json_schema: Mapping[str, Any] | str | None = option(
        help="the answer is JSON that this JSON schema allows: a mapping, or its text; on the command line a file or "
        "its text", check=a_schema, read=read_schema, metavar="FILE|TEXT",
    )  # fmt: skip
    regex: str | None = option(
        help="the answer matches this regular expression as a whole", check=a_regex, metavar="PATTERN"
    )
    choice: Sequence[str] | None = option(
        help="the answer is one of these texts; may be repeated", check=choices, each=True, metavar="TEXT"
    )
    response_format: Mapping[str, Any] | None = option(
        help="the form of the answer as OpenAI's API has it: text, json_object or json_schema",
        check=a_response_format,
        python_only=True,
    )
    logprobs: bool | None = option(
        False, help="give the log-probability of each generated token, before temperature and penalties; on the "
        "command line with --json",
    )  # fmt: skip
    top_logprobs: int | None = option(
        help="with logprobs, those of the most probable N tokens too", least=0, most=20, metavar="N"
    )
    prefill_step_size: int | None = option(
        help="prompt tokens of a prefill chunk (default: by memory, context and chip)", least=1, metavar="N"
    )
    cache: Cache | Sequence[Cache] | None = option(
        help="a cache from model.make_cache() whose tokens stand before this prompt's, as they are: earlier reasoning "
        "stays in (for a chat take Conversation); in the end it holds the prompt and every generated token, except the "
        "last one where max_tokens ended the generation, and of two answers at a time those of the one that ends last; "
        "of several prompts a list",
        check=_a_cache, python_only=True,
    )  # fmt: skip
    library: PrefixLibrary | None = option(
        help="what remembers prompts: the longest beginning of this prompt that it holds is not read again",
        check=_a_library, python_only=True,
    )  # fmt: skip
    sampler: Choice | None = option(
        help="function that chooses a token: log-probabilities (1, V) -> (1,), as in mlx-lm; it takes the place of "
        "the options from temp to min_p and of XTC, and the seed is its own affair; without drafts", check=_a_sampler,
        python_only=True,
    )  # fmt: skip
    logits_processors: Sequence[Processor] | None = option(
        help="functions (tokens (n,), logits (1, V)) -> logits, as in mlx-lm, applied in order before sampling; the "
        "same seed gives the same text if they depend on their arguments alone; without drafts", check=_processors,
        python_only=True,
    )  # fmt: skip
    constraint: Constraint | None = option(
        help="object with accept(token), rollback(count) and mask() -> (V,) boolean, True for each token that may come "
        "next, end tokens and reasoning included, or None for all; of one prompt",
        check=_a_constraint, python_only=True,
    )  # fmt: skip
    progress: Callable[[int, int], object] | None = option(
        help="called during prefill with the tokens done and the tokens in all", check=_a_function, python_only=True
    )
    media_progress: Callable[[int, int], object] | None = option(
        help="called before each image or video of a prompt is encoded with how many are, and how many there are; a "
        "page of a PDF is an image", check=_a_function, python_only=True,
    )  # fmt: skip


WARPERS = (
    "temp", "top_k", "top_p", "min_p", "min_tokens_to_keep", "xtc_probability", "xtc_threshold", "xtc_special_tokens",
)  # the options whose work a caller's sampler does
# An option -> the one without which it has no effect.
NEEDS = {
    "top_logprobs": "logprobs", "min_tokens_to_keep": "min_p", "xtc_threshold": "xtc_probability",
    "xtc_special_tokens": "xtc_probability",
}  # fmt: skip
GROUPS = (PromptOptions, GenerationOptions, Sampling, VisionOptions)


class Options(TypedDict, total=False):
    """Keyword options of generate, stream_generate and batch_generate; every one may be left out.

    PromptOptions, GenerationOptions, Sampling and VisionOptions declare them, with meanings, bounds and defaults;
    docs/options.md has the table.
    """

    images: Sequence[Any]
    videos: Sequence[Any]
    pdfs: Sequence[Any]
    pages: str
    ignore_chat_template: bool
    system_prompt: str
    system: str
    enable_thinking: bool
    tools: Sequence[Mapping[str, Any]]
    preserve_thinking: bool
    continue_final_message: bool
    max_tokens: int
    stop: Sequence[str]
    preset: str
    seed: int | Sequence[int]
    adapter: str | Sequence[str | None]
    mtp: str
    mtp_depth: int
    thinking_budget: int
    reasoning_effort: str
    loop_guard: bool
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    json_schema: Mapping[str, Any] | str
    regex: str
    choice: Sequence[str]
    response_format: Mapping[str, Any]
    logprobs: bool
    top_logprobs: int
    prefill_step_size: int
    cache: Cache | Sequence[Cache]
    library: PrefixLibrary
    sampler: Choice
    logits_processors: Sequence[Processor]
    constraint: Constraint
    progress: Callable[[int, int], object]
    media_progress: Callable[[int, int], object]
    temp: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens_to_keep: int
    xtc_probability: float
    xtc_threshold: float
    xtc_special_tokens: Sequence[int]
    min_pixels: int
    max_pixels: int
    fps: float
    video_num_frames: int
    video_total_pixels: int
    source_fps: float
    dpi: int
    published_limits: bool
    outer_vision_tags: bool
    allow_private_urls: bool


def check_options(given: Mapping[str, Any]) -> Options:
    """The options that are not None, by their first names, with checked values.

    InputError for an unknown name and for a value that breaks its rule, whatever the prompt will be.
    """
    options = cast(Options, check_keywords(given, GROUPS))
    vision_options(options)
    thinking_switch(options)
    check_constraints(options)
    draft_options(options)
    for name, other in NEEDS.items():
        if name in options and not options.get(other):
            raise InputError(
                "option_no_effect",
                f"{spelled(name)} must be given with {spelled(other)}: it would have no effect alone",
            )
    if "sampler" in options and (idle := [name for name in WARPERS if name in options]):
        raise InputError(
            "option_conflict", f"{listed(idle)} must not be given with sampler, which chooses the token by itself"
        )
    return options


def check_constraints(options: Options) -> None:
    """A constraint of the caller's is asked about every token, so no other rule goes with it; one budget is enough."""
    budgets = [name for name in ("thinking_budget", "reasoning_effort") if name in options]
    if len(budgets) > 1:
        raise InputError("option_conflict", f"{listed(budgets)} say the same: leave one out")
    if options.get("continue_final_message"):
        forms = ("json_schema", "regex", "choice", "response_format", "tool_choice")
        whole = [name for name in forms if options.get(name) not in (None, "none", "auto", {"type": "text"})]
        if whole:
            raise InputError(
                "option_conflict",
                f"{listed(whole)} must not be given with continue_final_message: it says the whole answer, whose "
                "beginning is there already",
            )
    if "constraint" not in options:
        return
    others = [
        name
        for name in ("json_schema", "regex", "choice", "response_format", "tool_choice", "loop_guard", *budgets)
        if options.get(name) not in (None, False, "none", "auto", {"type": "text"})
    ]
    tools = options.get("tools", ()) if options.get("tool_choice") != "none" else ()
    others += ["tools"] * any(tool.strict for tool in read_tools(tools))
    if others:
        raise InputError(
            "option_conflict", f"{listed(others)} must not be given with constraint, which says every token by itself"
        )


def draft_options(options: Options) -> tuple[str, int | None]:
    """mtp and mtp_depth. The caller's own functions are asked for one token at a time, so no drafts go with them."""
    mode, depth = options.get("mtp", "auto"), options.get("mtp_depth")
    own = [name for name in ("sampler", "logits_processors") if options.get(name)]
    if not own:
        return mode, depth
    if mode == "on" or depth is not None:
        drafts = spelled("mtp" if depth is None else "mtp_depth")
        raise InputError(
            "option_conflict", f"{drafts} must not be given with {listed(own)}, with which nothing is drafted"
        )
    return "off", None


def vision_options(options: Options) -> VisionOptions:
    given: dict[str, Any] = {name: value for name, value in options.items() if name in VISION_OPTIONS}
    return VisionOptions(**given)


def sampling_options(options: Options) -> dict[str, Any]:
    """The values that replace those of a preset."""
    return {name: value for name, value in options.items() if name in options_of(Sampling)}


def thinking_switch(options: Options) -> bool | None:
    """enable_thinking for the chat template, as the options have it; None: the template's own default."""
    given: Mapping[str, Any] = options
    meaning: dict[str, Callable[[Any], bool]] = {
        "enable_thinking": bool,
        "preset": lambda name: PRESETS[name].thinking,
        "reasoning_effort": lambda effort: effort != "none",
        "thinking_budget": lambda tokens: True,
    }
    meant = {name: thinks(given[name]) for name, thinks in meaning.items() if name in given}
    if len(set(meant.values())) > 1:
        ways = [f"{spelled(name, given[name])} is {'with' if on else 'without'} thinking" for name, on in meant.items()]
        raise InputError("option_conflict", f"{', '.join(ways)}: they exclude each other. Leave one out")
    return next(iter(meant.values()), None)
