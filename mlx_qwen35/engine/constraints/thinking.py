"""Thinking that ends: the budget of a request, and the tokens that close it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt

if TYPE_CHECKING:
    from mlx_qwen35.engine.options import Options

ROOM = 256  # tokens that a budget leaves to the answer
NOTHING = 3  # tokens that close thinking before its first: a line end, </think>, a blank line
EFFORTS = {"none": 0, "minimal": 1024, "low": 4096, "medium": 16384, "high": None}  # tokens; None: no budget
SENTENCE = "\n\nThat is enough thinking. Now I give the answer.\n"  # behind it comes </think>
BLANK = "\n\n"  # between </think> and the answer, as the chat template has it


def closing_tokens(processor: Processor) -> tuple[int, ...]:
    """The tokens that close thinking: a sentence, </think>, and the blank line before the answer."""
    assert processor.think_end is not None, "a prompt that opens thinking has the tokens for it"
    return (*_text(processor, SENTENCE), processor.think_end, *blank_tokens(processor))


def blank_tokens(processor: Processor) -> tuple[int, ...]:
    """The blank line between </think> and the answer."""
    return _text(processor, BLANK)


def line_tokens(processor: Processor) -> tuple[int, ...]:
    """The line end in front of </think> where nothing was thought."""
    return _text(processor, "\n")


def _text(processor: Processor, text: str) -> tuple[int, ...]:
    return tuple(processor.tokenizer.encode(text, add_special_tokens=False))


def check_thinking(options: "Options", prompts: Sequence[Prompt]) -> None:
    """InputError for a budget or an effort that has no prompt to think about."""
    given = [name for name in ("thinking_budget", "reasoning_effort") if name in options]
    off = options.get("reasoning_effort") == "none"
    if given and any(prompt.thinking for prompt in prompts) == off:
        raise InputError(
            "option_no_effect",
            f"{spelled(given[0])} must not be given here: the answer {'begins' if off else 'does not begin'} inside "
            "<think>, where the prompt ends",
        )


def budget_of(options: "Options", limit: int, closing: int) -> int | None:
    """Most tokens of thinking in an answer of `limit` tokens; None: no budget.

    closing: tokens that close thinking. InputError for a number that leaves no room; an effort is cut to what fits.
    """
    number = options.get("thinking_budget")
    room = limit - ROOM - (closing if number != 0 else NOTHING)
    if number is None:
        effort = EFFORTS[options.get("reasoning_effort", "high")]
        return None if effort is None else max(0, min(effort, room))
    if number > room:
        fits = f"at most {room:,} of them fit into thinking" if room >= 0 else "none fits into thinking"
        raise InputError(
            "thinking_budget_exceeded",
            f"{spelled('thinking_budget')} must leave {ROOM} tokens to the answer, and {limit - ROOM - room} to close "
            f"thinking; the answer may have {limit:,}, and {fits}; got {number:,}. Raise {spelled('max_tokens')} to "
            f"{number + limit - room:,}" + (", or lower it" if room >= 0 else ""),
        )
    return number
