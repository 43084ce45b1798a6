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
        state = "think, whatever this says" if off else "not think"
        raise InputError(
            "option_no_effect",
            f"{spelled(given[0])} must not be given with these prompts, which {state}: thinking is on or off where "
            "a prompt ends inside or behind <think>, see the chat template",
        )


def budget_of(options: "Options", limit: int, closing: int) -> int | None:
    """Most tokens of thinking in an answer of `limit` tokens; None: no budget.

    closing: tokens that close thinking. InputError for a number that leaves no room; an effort is cut to what fits.
    """
    room = limit - closing - ROOM
    number = options.get("thinking_budget")
    if number is None:
        effort = EFFORTS[options.get("reasoning_effort", "high")]
        return None if effort is None else max(0, min(effort, room))
    if number > room:
        raise InputError(
            "thinking_budget_exceeded",
            f"{spelled('thinking_budget')} must leave {ROOM} tokens to the answer, and {closing} to close thinking; of "
            f"{limit:,} tokens {max(0, room):,} are left for thinking, got {number:,}. Lower it, or raise "
            f"{spelled('max_tokens')}",
        )
    return number
