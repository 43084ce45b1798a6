"""What a chat shows: answers as they come, confirmations, errors. On a terminal terminal.py has another one."""

import sys
from typing import Protocol

from mlx_qwen35.commands.output import print_pieces, tell_cut
from mlx_qwen35.commands.session import tell_interrupted
from mlx_qwen35.console.progress import Step
from mlx_qwen35.engine.conversation import Conversation, Turn
from mlx_qwen35.engine.result import Result


class Screen(Protocol):
    """Where a chat writes to."""

    def say(self, text: str) -> None:
        """A confirmation, or what was asked for, as /help."""

    def fail(self, text: str) -> None:
        """An error, or what could not be done."""

    def step(self, what: str, unit: str = "", timed: bool = False) -> Step:
        """A step that may take long, as a context; called with what is done and all."""

    def answer(self, conversation: Conversation, turn: Turn) -> bool:
        """Show an answer to its end, or to Ctrl-C, which cancels the turn; False where it has no token."""


class PlainScreen:
    """Text to standard output, all else to standard error, without colours."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def fail(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def step(self, what: str, unit: str = "", timed: bool = False) -> Step:
        return Step(what, unit, timed)

    def answer(self, conversation: Conversation, turn: Turn) -> bool:
        with self.step("prefill", "tokens", timed=True) as prefill:
            turn.progress = prefill
            try:
                print_pieces(turn, prefill)
            except KeyboardInterrupt:
                turn.cancel()
                print()
                if turn.result is not None and not turn.result.tokens:
                    tell_interrupted(conversation, turn)
        if turn.result is None or not turn.result.tokens:
            return False
        self.say(f"[{statistics(turn, turn.result)}]")
        tell_cut(turn.result, conversation.model, "/reset begins anew")
        return True


def statistics(turn: Turn, result: Result) -> str:
    drafts = result.mtp
    accepted = f"{drafts.accepted} of {drafts.drafted} drafts accepted; " if drafts.drafted else ""
    return (
        f"prompt {turn.total} tokens, {turn.reused} reused, {turn.total - turn.reused} prefilled in "
        f"{turn.prefill_seconds:.2f} s; {result.generation_tokens} tokens at {result.generation_tps:.1f} per "
        f"second, {result.finish_reason}; {accepted}{result.peak_memory:.3f} GB"
    )
