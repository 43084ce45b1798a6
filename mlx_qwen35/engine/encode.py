"""A prompt in any of its forms -> tokens, and the images and videos that they show."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.prefix_tokens import Prefix, Shown
from mlx_qwen35.engine.options import Options, PromptOptions, thinking_switch, vision_options
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.options import VISION_OPTIONS
from mlx_qwen35.media.preprocess import Page
from mlx_qwen35.options import listed, options_of, spelled
from mlx_qwen35.prompt.processor import Messages, Processor
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.values import shown


def encode(processor: Processor, prompt: str | Sequence[int] | Messages, options: Options) -> Prompt:
    """Tokens and media of a prompt.

    A string is one user message put through the chat template, or raw text with ignore_chat_template; a list of
    integers is tokens as they are; a list of mappings is messages.
    """
    given: Any = prompt.tolist() if isinstance(prompt, np.ndarray | mx.array) else prompt
    if not isinstance(given, str | list | tuple):
        raise InputError(
            "prompt_invalid",
            f"a prompt must be text, a list of tokens or a list of messages, got {shown(given)}",
        )
    if not (given.strip() if isinstance(given, str) else given):
        raise InputError("prompt_empty", "the prompt must not be empty")
    if not isinstance(given, str) and not isinstance(given[0], Mapping):
        return _tokens(processor, given, options)
    vision, images, videos = vision_options(options), options.get("images", ()), options.get("videos", ())
    if isinstance(given, str) and options.get("ignore_chat_template"):
        _refuse_idle("raw text", options)
        return processor.encode_text(given, images=images, videos=videos, vision=vision)
    _refuse_idle("text" if isinstance(given, str) else "messages", options)
    messages = _messages(given, options) if isinstance(given, str) else given
    return processor.encode_messages(
        messages, vision, continue_final_message=options.get("continue_final_message", False),
        **template_options(options),
    )  # fmt: skip


def prefix_of(prompt: Prompt, adapter: str = "") -> Prefix:
    """A prompt as a library of prefixes compares it. adapter: the name of the one that reads it, "" for none."""
    shown = (Shown(placed.media.digest, placed.placeholders) for placed in prompt.media)
    return Prefix(np.array(prompt.tokens, np.int32), tuple(shown), adapter)


def template_options(options: Options) -> dict[str, Any]:
    """The options that the chat template reads; None: not given."""
    return {
        "enable_thinking": thinking_switch(options),
        "preserve_thinking": options.get("preserve_thinking"),
        "tools": options.get("tools"),
    }


def _tokens(processor: Processor, prompt: Sequence[Any], options: Options) -> Prompt:
    _refuse_idle("tokens", options)
    tokens = processor.check_tokens(prompt)
    return Prompt(tuple(tokens), processor.opens_thinking(tokens))


def _messages(text: str, options: Options) -> Messages:
    media = [("image", source) for source in options.get("images", ())]
    media += [("video", source) for source in options.get("videos", ())]
    media += [("pdf", source) for source in options.get("pdfs", ())]
    return one_message(text, media, options.get("system_prompt"), options.get("pages"))


def one_message(
    text: str, media: Sequence[tuple[str, Any]], system: str | None, pages: str | None = None
) -> Messages:
    """One user message of images, videos and PDFs, as pairs of kind and source, and text; behind the system's, if any.

    pages: of each PDF.
    """
    if pages is not None and not any(kind == "pdf" for kind, _ in media):
        raise InputError("option_no_effect", f"{spelled('pages')} must be given with a PDF: it would have no effect")
    parts = [{"type": kind, kind: source} | ({"pages": pages} if kind == "pdf" else {}) for kind, source in media]
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


def _refuse_idle(kind: str, options: Options) -> None:
    """An option without effect on this kind of prompt is refused."""
    # False and [] ask for nothing.
    switches = ("ignore_chat_template", "continue_final_message", "images", "videos", "pdfs")
    idle = [
        name
        for name, declared in options_of(PromptOptions).items()
        if kind not in declared.prompts and (options.get(name) if name in switches else name in options)
    ]
    if idle:
        raise InputError(
            "option_no_effect", f"{listed(idle)} must not be given with a prompt of {kind}: it would have no effect"
        )


def refuse_idle_vision(options: Options, prompts: Sequence[Prompt]) -> None:
    """An option for images needs an image among the prompts, one for videos a video."""
    media = [placed.media for prompt in prompts for placed in prompt.media]
    kinds = {item.kind for item in media} | {"PDF" for item in media if isinstance(item, Page)}
    for needed in ("image", "video", "PDF", "image or video"):
        idle = [name for name, declared in VISION_OPTIONS.items() if declared.media == needed and options.get(name)]
        if idle and not kinds & set(needed.split(" or ")):
            raise InputError(
                "option_no_effect", f"{listed(idle)} must not be given without {needed}: it would have no effect"
            )
