"""Text from a model: generate, stream_generate, batch_generate."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Unpack

import mlx.core as mx
import numpy as np

from mlx_qwen35.engine.generation import start
from mlx_qwen35.engine.options import Options, check_options
from mlx_qwen35.engine.result import Result
from mlx_qwen35.errors import EmptyAnswer, InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.piece import Piece
from mlx_qwen35.prompt.processor import Messages, Processor
from mlx_qwen35.values import shown


def _one(prompt: str | Sequence[int] | None, messages: Messages | None) -> str | Sequence[int] | Messages:
    if prompt is None and messages is not None:
        return messages
    if prompt is None or messages is not None:
        raise TypeError("give either prompt or messages")
    return prompt


def generate(
    model: Model,
    processor: Processor,
    prompt: str | Sequence[int] | None = None,
    *,
    messages: Messages | None = None,
    **options: Unpack[Options],
) -> Result:
    """Answer one prompt.

    Args:
        model, processor: from `load`.
        prompt: one user message, put through the chat template; with ignore_chat_template=True raw text; or token ids.
        messages: instead of prompt, a conversation: [{"role": "user", "content": "..."}, ...]; with images and videos
            see Processor.encode_messages.
        options: see `Options`.

    Raises InputError for a prompt or an option that breaks a rule.
    """
    (result,) = batch_generate(model, processor, [_one(prompt, messages)], **options)
    return result


def stream_generate(
    model: Model,
    processor: Processor,
    prompt: str | Sequence[int] | None = None,
    *,
    messages: Messages | None = None,
    **options: Unpack[Options],
) -> Iterator[Piece]:
    """Like generate, but yields pieces of text as they come: str(piece) is the text, piece.reasoning tells the kind.

    Prompt and options are checked when the first piece is asked for. Any thread may ask for the next one. A stream that
    is left frees its memory when it is closed or let go.
    """
    for _, piece in start(model, processor, [_one(prompt, messages)], **options):
        yield piece


def batch_generate(
    model: Model, processor: Processor, prompts: Sequence[str | Sequence[int] | Messages], **options: Unpack[Options]
) -> list[Result]:
    """Answer several prompts of any lengths together; each gets what it would get alone with the same seed.

    Row i has the seed `seed` + i, or the i-th of a list. Images and videos of the options are shown to every prompt.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list; for one prompt there is generate")
    if not isinstance(prompts, list | tuple | np.ndarray | mx.array):
        raise InputError("prompt_invalid", f"prompts must be a list, got {shown(prompts)}")
    if not len(prompts):
        check_options(options)
        return []
    generation = start(model, processor, list(prompts), **options)
    for _ in generation:
        pass
    results = generation.results()
    if empty := [result for result in results if result.cut_in_reasoning]:
        warnings.warn(
            f"{len(empty)} of {len(results)} answers: no text, since thinking took all of max_tokens. Raise it, give a "
            "thinking_budget, or answer with enable_thinking=False",
            EmptyAnswer,
            stacklevel=2,
        )
    return results
