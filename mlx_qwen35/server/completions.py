"""POST /v1/completions: raw text, or tokens, that the model goes on with. Control tokens in it are control tokens."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlx_qwen35.engine.logprobs import TokenLogprob, TopLogprob
from mlx_qwen35.engine.options import GenerationOptions
from mlx_qwen35.engine.result import Result
from mlx_qwen35.prompt.piece import CONTENT, REASONING
from mlx_qwen35.server import asked
from mlx_qwen35.server.fields import Fields, read_body
from mlx_qwen35.server.replies import Choice, Kind, Wanted, reply
from mlx_qwen35.server.service import Event, Service
from mlx_qwen35.server.trimmed import Trimmed

DEFAULT_TOKENS = 16  # as OpenAI has it


class Written:
    """One choice as it grows. Reasoning, where the prompt or the model opens one, is no part of its text."""

    def __init__(self, index: int):
        self.index, self._text, self._reasoning, self._trimmed = index, "", "", Trimmed()
        self._place = 0  # characters of the tokens so far

    def opening(self) -> list[Choice]:
        return []

    def said(self, event: Event) -> list[Choice]:
        text, reasoning = (
            "".join(piece.text for piece in event.pieces if piece.kind == kind) for kind in (CONTENT, REASONING)
        )
        reasoning = self._trimmed.add(reasoning)
        self._text, self._reasoning = self._text + text, self._reasoning + reasoning
        if not (text or reasoning or event.logprobs):
            return []
        told = _logprobs(event.logprobs, self._place) if event.logprobs else None
        self._place += sum(len(token.text) for token in event.logprobs)
        return [self._choice(text, reasoning, told, None)]

    def ending(self, finish_reason: str) -> Choice:
        return self._choice("", "", None, finish_reason)

    def whole(self, result: Result, finish_reason: str) -> Choice:
        told = None if result.logprobs is None else _logprobs(result.logprobs, 0)
        return self._choice(self._text, self._reasoning, told, finish_reason)

    def _choice(self, text: str, reasoning: str, told: Choice | None, ended: str | None) -> Choice:
        thought = {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}
        return {"index": self.index, "text": text, **thought, "logprobs": told, "finish_reason": ended}


def _logprobs(tokens: Sequence[TokenLogprob], place: int) -> Choice:
    """Of every generated token. text_offset: the characters of the tokens before it."""
    offsets = accumulate((len(token.text) for token in tokens[:-1]), initial=place)
    return {
        "tokens": [_name(token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{_name(other): other.logprob for other in token.top} for token in tokens],
        "text_offset": list(offsets),
    }


def _name(token: TopLogprob) -> str:
    """Its text; of part of a character its bytes, as OpenAI writes them."""
    if "\ufffd" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


_KIND = Kind("cmpl", "text_completion", "text_completion", Written)


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request)
    return await reply(request, await service.off_loop(lambda: _read(body, service)), _KIND)


def _read(body: Fields, service: Service) -> Wanted:
    model = asked.model(body, service)
    stream, usage = asked.streaming(body)
    prompts = _prompts(body)
    n = body.whole("n", 1, least=1, most=max(1, asked.MOST_ANSWERS // len(prompts)))
    options = asked.sampling(body, service) | {"max_tokens": DEFAULT_TOKENS}
    options |= asked.most_tokens(body, "max_tokens") | asked.stops(body) | asked.form(body)
    if (top := body.whole("logprobs", None, least=0, most=asked.MOST_TOP)) is not None:
        options |= {"logprobs": True, "top_logprobs": top}
    options |= body.option("loop_guard", GenerationOptions)
    body.refuse("suffix", "write the tokens for it into the prompt")
    asked.settle(body)
    with body.naming("prompt"):
        jobs = [service.prepare(prompt, n, model, **_raw(prompt), **options) for prompt in prompts]
        return Wanted(jobs, stream, usage)


def _prompts(body: Fields) -> Sequence[str | list[int]]:
    """One text, or tokens of one; or a list of either."""
    given = body.any("prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and _kinds(given) == {int}):
        return [given]
    if not isinstance(given, list) or _kinds(given) not in ({str}, {list}) or len(given) > asked.MOST_ANSWERS:
        rule = f"must be text or token ids, or a list of at most {asked.MOST_ANSWERS} of either"
        raise body.error("prompt", rule, given)
    return given


def _kinds(items: Iterable[Any]) -> set[type]:
    return {type(item) for item in items}


def _raw(prompt: str | list[int]) -> dict[str, Any]:
    return {"ignore_chat_template": True} if isinstance(prompt, str) else {}
