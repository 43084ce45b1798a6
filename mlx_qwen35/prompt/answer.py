"""An answer as it comes -> reasoning, content and tool calls. The one way from generated text to what programs use."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.prompt.calls import CallScanner
from mlx_qwen35.prompt.piece import CALL, CONTENT, REASONING, Piece
from mlx_qwen35.prompt.tokenizer import END_TOKENS
from mlx_qwen35.prompt.tool_calls import Cut, ToolCall, Tools
from mlx_qwen35.values import shown

_THINK = re.compile("(</?think>)")
_BLANK_LINES = re.compile(r"(?:[ \t\r]*\n)*")


class AnswerParser:
    """Splits an answer into pieces of reasoning, content and calls, whatever the pieces that its text comes in.

    With tools, content has no blank lines at its ends and around calls. Without, it is as it came, but for the line
    ends between </think> and the answer.

    A call inside the reasoning is a draft, unless thinking is never closed and whole calls are the last that came.

    Args:
        tools: the functions that may be called; None: no call is looked for.
        thinking: whether the text begins inside the reasoning.
        call_id: number of a call -> its id.
        one_call: whether of calls that end thinking only the first counts.
    """

    def __init__(
        self, tools: Tools | None, thinking: bool, call_id: Callable[[int], str], one_call: bool = False
    ):
        self._tools, self._call_id, self._one_call = tools, call_id, one_call
        self.reasoning = thinking
        self._calls: list[ToolCall] = []  # of earlier scanners
        self._cut: Cut | None = None
        self._scanner: CallScanner | None = None  # of the reasoning or of the content, whichever it is
        self._ids: dict[str, str] = {}  # of its calls: the scanner's -> ours
        self._numbered = 0  # calls that were given out
        self._started = not thinking  # the line ends between reasoning and content are behind
        self._draft: list[Piece] = []  # of calls inside the reasoning that may be calls
        self._raw, self._given = "", 0  # reasoning that waits; characters of it that were given out before
        self._gap = ""  # content that may be blank lines at its end
        self._spoke = self._segment = False  # some content came; some since the last call
        self._begin()

    @property
    def calls(self) -> list[ToolCall]:
        """The whole calls so far. Those of reasoning that is never closed are calls at the end."""
        found = [call for call in self._scanner.calls if call.id in self._ids] if self._scanner else []
        return [*self._calls, *(replace(call, id=self._ids[call.id]) for call in found)]

    @property
    def cut(self) -> Cut | None:
        """A call that had begun and is not whole, at the end."""
        return self._cut or (self._scanner.cut if self._scanner and not self.reasoning else None)

    def _begin(self) -> None:
        self._scanner = None if self._tools is None else CallScanner(self._tools)
        self._ids, self._draft, self._raw, self._given = {}, [], "", 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that this text completes."""
        if self._scanner is None:
            return self._plain(text)
        if self.reasoning:
            self._raw += text
            return self._thought(self._scanner.feed(text))
        return self._said(self._scanner.feed(text))

    def think(self, opens: bool) -> list[Piece]:
        """<think> or </think> comes."""
        rest: list[Piece] = []
        if self._scanner and self.reasoning:
            rest = self._reasoned(len(self._raw))
        elif self._scanner:
            rest = self._said(self._scanner.finish(cut=False))
            self._gap, self._segment = "", False
            self._calls, self._cut = self.calls, self.cut
        self.reasoning, self._started = opens, False
        self._begin()
        return rest

    def finish(self, cut: bool) -> list[Piece]:
        """The rest, at the end. cut: the limit of tokens ended the answer."""
        if self._scanner is None:
            return []
        pieces = self._scanner.finish(cut)
        if not self.reasoning:
            return self._said(pieces)
        out = self._thought(pieces)
        if not self._draft or self._scanner.cut:
            return out + self._reasoned(len(self._raw))
        calls = [piece for piece in self._draft if piece.kind != CONTENT]
        if self._one_call:
            calls = [piece for piece in calls if piece.id == calls[0].id]
        return out + [self._numbered_piece(piece) for piece in calls]

    def _numbered_piece(self, piece: Piece) -> Piece:
        """A piece of a call with the id that the call has in the answer."""
        if piece.kind == CALL:
            self._ids[piece.id] = self._call_id(self._numbered)
            self._numbered += 1
        return replace(piece, id=self._ids[piece.id])

    # --- reasoning -------------------------------------------------------------------------------------------------

    def _thought(self, pieces: Iterable[tuple[Piece, int]]) -> list[Piece]:
        """Pieces of reasoning. From a call on they wait: more reasoning behind it makes it a draft."""
        out: list[Piece] = []
        for piece, end in pieces:
            if piece.kind != CONTENT or (self._draft and not piece.text.strip()):
                self._draft.append(piece)
            else:
                out += self._reasoned(end - self._given)
        return out

    def _reasoned(self, length: int) -> list[Piece]:
        """Give out so much of the reasoning that waits."""
        text, self._raw, self._draft = self._raw[:length], self._raw[length:], []
        self._given += length
        return [Piece(text, REASONING)] if text else []

    # --- content ---------------------------------------------------------------------------------------------------

    def _plain(self, text: str) -> list[Piece]:
        """Without tools."""
        if not self._started:
            text = text.lstrip("\n")
            self._started = bool(text)
        return [Piece(text, REASONING if self.reasoning else CONTENT)] if text else []

    def _said(self, pieces: Iterable[tuple[Piece, int]]) -> list[Piece]:
        out: list[Piece] = []
        for piece, _ in pieces:
            if piece.kind == CONTENT:
                out += self._trimmed(piece.text)
            else:
                self._gap, self._segment = "", False
                out.append(self._numbered_piece(piece))
        return out

    def _trimmed(self, text: str) -> list[Piece]:
        """Content without the blank lines at its ends; that of before and behind a call is a blank line apart."""
        text, self._gap = self._gap + text, ""
        if not self._segment:
            text = text[_BLANK_LINES.match(text).end() :]  # type: ignore[union-attr]
        stop = len(text.rstrip())  # the blanks at its end may be no part of it
        text, self._gap = text[:stop], text[stop:]
        if not text:
            return []
        text = "\n\n" + text if self._spoke and not self._segment else text
        self._spoke = self._segment = True
        return [Piece(text, CONTENT)]


def finish_reason(ended: str, calls: bool) -> str:
    """Why an answer ended, with whole calls or without."""
    return "tool_calls" if ended == "stop" and calls else ended


@dataclass(frozen=True)
class Answer:
    """A parsed answer.

    reasoning, content: text, without blank lines at its ends; None: there is none. tool_calls: the whole calls. cut: a
    call that had begun, None for none. finish_reason: "tool_calls", or how it ended.
    """

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...]
    cut: Cut | None
    finish_reason: str


def parse_answer(
    text: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    ended: str = "stop",
    tool_choice: str = "auto",
) -> Answer:
    """Split a whole answer into reasoning, content and tool calls.

    Args:
        text: what the model generated, with the tags <think>, </think>, <tool_call> and </tool_call>; end tokens at its
            end are left out.
        tools: the functions that the prompt offered; their schemas type the arguments. None or none of them: no call is
            looked for.
        thinking: whether the prompt ended inside a thinking block, as it does where the chat template opens one. Then
            text without </think> is reasoning.
        ended: "stop", the model's end token, or "length", the limit of tokens.
        tool_choice: "none" looks for no calls.

    Raises InputError (option_invalid) for a text that is none, tools that are no list and another `ended`.
    """
    if not isinstance(text, str) or not isinstance(tools, list | tuple | None) or ended not in ("stop", "length"):
        raise InputError(
            "option_invalid",
            f"parse_answer needs a text, a list of tools or None, and ended as stop or length; got {shown(text)}, "
            f"{shown(tools)} and {shown(ended)}",
        )
    named = Tools(tools) if tools and tool_choice != "none" else None
    while end := next((token for token in END_TOKENS if text.endswith(token)), ""):
        text = text.removesuffix(end)
    parser = AnswerParser(named, thinking, "call_{}".format)
    pieces: list[Piece] = []
    for part in _THINK.split(text):
        pieces += parser.think(part == "<think>") if _THINK.fullmatch(part) else parser.feed(part)
    pieces += parser.finish(cut=ended == "length")
    spoken = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in (REASONING, CONTENT)}
    reasoning, content = (_without_blank_lines(spoken[kind]) or None for kind in (REASONING, CONTENT))
    return Answer(reasoning, content, tuple(parser.calls), parser.cut, finish_reason(ended, bool(parser.calls)))


def _without_blank_lines(text: str) -> str:
    return text[_BLANK_LINES.match(text).end() :].rstrip()  # type: ignore[union-attr]
