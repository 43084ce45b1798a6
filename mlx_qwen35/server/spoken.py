"""A choice in OpenAI's chat form: pieces -> deltas of a stream -> the message that they add up to.

The message of an answer that is not streamed is the sum of the deltas that a stream would have had.
"""

from collections.abc import Iterable
from typing import Any

from mlx_qwen35.engine.logprobs import TokenLogprob, TopLogprob
from mlx_qwen35.engine.result import Result
from mlx_qwen35.prompt.piece import ARGUMENTS, CALL, CONTENT, REASONING, Piece
from mlx_qwen35.server.replies import Choice
from mlx_qwen35.server.service import Event
from mlx_qwen35.server.trimmed import Trimmed

Delta = dict[str, Any]


class Spoken:
    """One choice as it grows."""

    def __init__(self, index: int):
        self.index = index
        self._content, self._reasoning, self._trimmed = "", "", Trimmed()
        self._calls: list[dict[str, Any]] = []

    def opening(self) -> list[Choice]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def said(self, event: Event) -> list[Choice]:
        deltas = [delta for piece in event.pieces if (delta := self._delta(piece))]
        choices = [self._chunk(delta) for delta in deltas or [{}] * bool(event.logprobs)]
        if event.logprobs:
            choices[0]["logprobs"] = _logprobs(event.logprobs)
        return choices

    def ending(self, finish_reason: str) -> Choice:
        return self._chunk({}) | {"finish_reason": finish_reason}

    def whole(self, result: Result, finish_reason: str) -> Choice:
        told = None if result.logprobs is None else _logprobs(result.logprobs)
        return {"index": self.index, "message": self._message(), "logprobs": told, "finish_reason": finish_reason}

    def _chunk(self, delta: Delta) -> Choice:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _delta(self, piece: Piece) -> Delta | None:
        if piece.kind == REASONING:
            text = self._trimmed.add(piece.text)
            self._reasoning += text
            return {"reasoning_content": text, "reasoning": text} if text else None
        if piece.kind == CONTENT:
            self._content += piece.text
            return {"content": piece.text}
        if piece.kind == CALL:
            function = {"name": piece.name, "arguments": ""}
            self._calls.append({"id": piece.id, "type": "function", "function": dict(function)})
            return {"tool_calls": [{"index": len(self._calls) - 1, **self._calls[-1], "function": function}]}
        if piece.kind == ARGUMENTS:
            index = next(i for i, call in enumerate(self._calls) if call["id"] == piece.id)
            self._calls[index]["function"]["arguments"] += piece.text
            return {"tool_calls": [{"index": index, "function": {"arguments": piece.text}}]}
        return None  # the end of a call, which OpenAI's stream does not tell

    def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content or (None if self._calls else "")}
        if self._reasoning:
            message |= {"reasoning_content": self._reasoning, "reasoning": self._reasoning}
        return message | ({"tool_calls": self._calls} if self._calls else {})


def _logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Of every generated token, those of reasoning, calls and the end among them."""
    content = [{**_logprob(token), "top_logprobs": [_logprob(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _logprob(token: TopLogprob) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": token.logprob}
