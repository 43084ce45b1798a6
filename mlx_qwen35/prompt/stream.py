"""Generated tokens -> pieces of an answer."""

import codecs
from collections.abc import Callable, Sequence

from mlx_qwen35.prompt.answer import AnswerParser
from mlx_qwen35.prompt.piece import CONTENT, Piece
from mlx_qwen35.prompt.tool_calls import Cut, ToolCall, Tools


class TextStream:
    """Tokens one by one -> pieces: whole characters, reasoning, content and calls apart, ended by a stop string.

    Stop strings are searched in the content, neither in the reasoning nor in calls. Content that may become one is held
    back. Reasoning is told by its tokens, and bytes that make no whole character before <think>, </think> and the end
    are dropped.

    Args:
        token_bytes: token -> its bytes; none for a special token, whose text is no part of an answer.
        think: the ids of <think> and </think>; None where the tokenizer has none.
        reasoning: whether the first token is inside the reasoning.
        stop: the stop strings.
        tools: the functions that may be called; None: no call is looked for.
        call_id: number of a call -> its id.
        one_call: see AnswerParser.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        think: tuple[int | None, int | None],
        reasoning: bool,
        stop: Sequence[str] = (),
        tools: Tools | None = None,
        call_id: Callable[[int], str] = "call_{}".format,
        one_call: bool = False,
    ):
        self._token_bytes, self._think, self.stop = token_bytes, think, tuple(stop)
        self._parser = AnswerParser(tools, reasoning, call_id, one_call)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = ""  # the stop string that came
        self.thought = 0  # tokens of the reasoning, </think> included

    @property
    def reasoning(self) -> bool:
        """Whether the next token is inside the reasoning."""
        return self._parser.reasoning

    @property
    def calls(self) -> list[ToolCall]:
        """The calls that are whole."""
        return self._parser.calls

    @property
    def cut(self) -> Cut | None:
        """A call that had begun, at the end."""
        return self._parser.cut

    def add(self, token: int) -> list[Piece]:
        """The pieces that this token completes."""
        if self.stopped:
            return []
        self.thought += self.reasoning
        if token in self._think:
            self._decoder.reset()
            return self._until_stop(self._parser.think(opens=token == self._think[0])) + self._release()
        text = self._decoder.decode(self._token_bytes(token))
        return self._until_stop(self._parser.feed(text)) if text else []

    def finish(self, cut: bool = False) -> list[Piece]:
        """What was held back, at the end. cut: the limit of tokens ended the answer."""
        if self.stopped:
            return []
        return self._until_stop(self._parser.finish(cut)) + self._release()

    def _release(self) -> list[Piece]:
        held, self._held = self._held, ""
        return [Piece(held, CONTENT)] if held and not self.stopped else []

    def _until_stop(self, pieces: list[Piece]) -> list[Piece]:
        if not self.stop:
            return pieces
        out: list[Piece] = []
        for piece in pieces:
            if piece.kind != CONTENT:
                out += [*self._release(), piece]
                continue
            text, self._held = self._held + piece.text, ""
            found = [(position, stop) for stop in self.stop if (position := text.find(stop)) >= 0]
            if found:
                position, self.stopped = min(found)
                return [*out, Piece(text[:position], CONTENT)] if position else out
            keep = len(text) - max(_overlap(text, stop) for stop in self.stop)
            text, self._held = text[:keep], text[keep:]
            out += [Piece(text, CONTENT)] if text else []
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
