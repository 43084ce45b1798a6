"""What a chat shows: answers as they come, confirmations, errors. On a terminal terminal.py has another one."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from mlx_qwen35.commands.output import print_pieces, tell_cut
from mlx_qwen35.commands.session import tell_interrupted
from mlx_qwen35.console.notices import on_lines_of_its_own, tell
from mlx_qwen35.console.progress import Step, duration
from mlx_qwen35.console.safe import safe
from mlx_qwen35.engine.conversation import Conversation, Turn
from mlx_qwen35.engine.result import Result
from mlx_qwen35.prompt.piece import Piece


class Screen(Protocol):
    """Where a chat writes to."""

    def say(self, text: str) -> None:
        """A confirmation, or what was asked for, as /help."""

    def note(self, text: str) -> None:
        """What nobody asked for, as the figures of an answer; with --quiet nothing."""

    def fail(self, text: str) -> None:
        """An error, or what could not be done."""

    def opened(self) -> AbstractContextManager[None]:
        """The block is a chat: what is typed where no prompt is waits unseen for the next one."""

    def step(self, what: str, unit: str = "", timed: bool = False) -> Step:
        """A step that may take long, as a context; called with what is done and all."""

    def answer(self, conversation: Conversation, turn: Turn) -> bool:
        """Show an answer to its end, or to Ctrl-C, which cancels the turn; False where it has no token."""


class PlainScreen:
    """Text to standard output, all else to standard error, without colours.

    hide_thinking: one line in place of the reasoning. verbose: all figures of an answer in place of three.
    """

    def __init__(self, hide_thinking: bool = False, verbose: bool = False):
        self._hide, self._verbose = hide_thinking, verbose

    def say(self, text: str) -> None:
        with on_lines_of_its_own():
            print(safe(text), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        tell(safe(text))

    def fail(self, text: str) -> None:
        with on_lines_of_its_own():
            print(safe(text), file=sys.stderr, flush=True)

    def opened(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, what: str, unit: str = "", timed: bool = False) -> Step:
        return Step(what, unit, timed)

    def answer(self, conversation: Conversation, turn: Turn) -> bool:
        with watched(turn, self) as prefill:
            try:
                print_pieces(folded(turn, prefill, self.note) if self._hide else turn, prefill)
            except KeyboardInterrupt:
                turn.cancel()
                print()
                if turn.result is not None and not turn.result.tokens:
                    tell_interrupted(conversation, turn)
        if turn.result is None or not turn.result.tokens:
            return False
        self.note(f"[{statistics(turn, turn.result) if self._verbose else summary(turn, turn.result)}]")
        tell_cut(turn.result, conversation.model, "/reset begins anew")
        return True


def watched(turn: Turn, screen: Screen) -> Step:
    """A step, to be entered, that shows how far a turn is: the images of its prompt, and then the prompt."""
    step = screen.step("prefill", "tokens", timed=True)
    turn.progress, turn.media_progress = step, step.images
    return step


def folded(turn: Turn, step: Step, say: Callable[[str], None]) -> Iterator[Piece]:
    """The pieces of an answer but for its reasoning, of which a line tells how long it was. step: what is shown now."""
    began = 0.0
    try:
        for piece in turn:
            if not piece.reasoning:
                began = _tell_thought(turn, began, step, say)
                yield piece
            elif not began:
                began = time.monotonic()
                step.say("thinking")
    finally:
        _tell_thought(turn, began, step, say)


def _tell_thought(turn: Turn, began: float, step: Step, say: Callable[[str], None]) -> float:
    if began and turn.result is not None:
        step.end()
        seconds = duration(time.monotonic() - began)
        say(f"thought for {seconds}, {_counted(turn.result.reasoning_tokens, 'token')}")
    return 0.0


def summary(turn: Turn, result: Result) -> str:
    """What most people want to know of an answer."""
    speed = result.generation_tps
    parts = [
        "interrupted" if result.finish_reason == "interrupted" else "",
        _counted(result.generation_tokens, "token"),
        f"{speed:.{0 if speed >= 10 else 1}f} tokens/s" if speed else "",
        f"{turn.prefill_seconds:.1f} s to the first",
    ]
    return " · ".join(filter(None, parts))


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def statistics(turn: Turn, result: Result) -> str:
    drafts = result.mtp
    accepted = f"{drafts.accepted} of {drafts.drafted} drafts accepted; " if drafts.drafted else ""
    return (
        f"prompt {turn.total} tokens, {turn.reused} reused, {turn.total - turn.reused} prefilled in "
        f"{turn.prefill_seconds:.2f} s; {result.generation_tokens} tokens at {result.generation_tps:.1f} per "
        f"second, {result.finish_reason}; {accepted}{result.peak_memory:.3f} GB"
    )
