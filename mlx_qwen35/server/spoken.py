"""What a choice says, in OpenAI's chat form: pieces -> deltas of a stream -> the message they add up to.

The message of an answer that is not streamed is the sum of the deltas that a stream would have had.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from mlx_qwen35.engine.logprobs import TokenLogprob, TopLogprob
from mlx_qwen35.engine.result import Result
from mlx_qwen35.prompt.piece import ARGUMENTS, CALL, CONTENT, REASONING, Piece
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.service import failed

Delta = dict[str, Any]


class Spoken:
    """One choice as it grows."""

    def __init__(self) -> None:
        self._content, self._reasoning = "", ""
        self._calls: list[dict[str, Any]] = []

    def deltas(self, pieces: Iterable[Piece]) -> list[Delta]:
        """What these pieces add, told to a stream."""
        return [delta for piece in pieces if (delta := self._delta(piece))]

    def _delta(self, piece: Piece) -> Delta | None:
        if piece.kind == REASONING:
            self._reasoning += piece.text
            return {"reasoning_content": piece.text, "reasoning": piece.text}
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

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content or (None if self._calls else "")}
        if self._reasoning:
            message |= {"reasoning_content": self._reasoning, "reasoning": self._reasoning}
        return message | ({"tool_calls": self._calls} if self._calls else {})


def finish_reason(result: Result) -> str:
    """OpenAI has no name for an answer that went round in circles: it is not whole, so it is "length"."""
    return "length" if result.finish_reason == "loop" else result.finish_reason


def refusal(result: Result) -> ApiError | None:
    """Why an answer has no end of its own, if it has none."""
    if result.finish_reason == "interrupted" and not result.error:
        return ApiError(503, "interrupted", "the server ended this answer", headers={"Retry-After": "5"})
    return failed(result)


def usage(results: Sequence[Result | None]) -> dict[str, Any]:
    """Tokens of all choices; their prompt counts once."""
    done = [result for result in results if result]
    prompt, completion = done[0].prompt_tokens, sum(result.generation_tokens for result in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": done[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(result.reasoning_tokens for result in done)},
    }


def logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Of every generated token, those of reasoning, calls and the end among them."""
    content = [{**_logprob(token), "top_logprobs": [_logprob(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _logprob(token: TopLogprob) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": token.logprob}
