"""Generated tokens -> text, piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Piece:
    """Some generated text: of the reasoning or of the answer. str() is the text."""

    text: str
    reasoning: bool

    def __str__(self) -> str:
        return self.text


class TextStream:
    """Tokens one by one -> pieces of text: whole characters, reasoning apart from answer, ended by a stop string.

    Stop strings are searched in the answer, not in the reasoning. Text that may become one is held back.

    Args:
        tokenizer: decodes the tokens.
        think: the ids of <think> and </think>; None where the tokenizer has none.
        reasoning: whether the first token is inside the reasoning.
        stop: the stop strings.
    """

    def __init__(
        self, tokenizer: "Tokenizer", think: tuple[int | None, int | None], reasoning: bool, stop: Sequence[str]
    ):
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._decoder = tokenizer, DecodeStream(skip_special_tokens=True)
        self._think = think
        self.stop = tuple(stop)
        self._held = ""
        self._started = not reasoning  # the blank lines between reasoning and answer belong to neither
        self.reasoning = reasoning  # whether the next token is inside the reasoning
        self.stopped = False  # a stop string came

    def add(self, token: int) -> list[Piece]:
        """The text that this token completes, as zero or more pieces."""
        if token in self._think:
            rest = self.finish()
            self.reasoning, self._started = token == self._think[0], False
            return rest
        text = self._decoder.step(self._tokenizer, token)
        if not text or self.stopped:
            return []
        if not self._started:
            text = text.lstrip("\n")
            self._started = bool(text)
        if not self.reasoning and self.stop:
            text = self._until_stop(text)
        return [Piece(text, self.reasoning)] if text else []

    def finish(self) -> list[Piece]:
        """The held text, at the end. Bytes that make no whole character are dropped."""
        held, self._held = self._held, ""
        return [Piece(held, self.reasoning)] if held and not self.stopped else []

    def _until_stop(self, text: str) -> str:
        text, self._held = self._held + text, ""
        found = [position for position in map(text.find, self.stop) if position >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = len(text) - max(_overlap(text, stop) for stop in self.stop)
        text, self._held = text[:keep], text[keep:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
