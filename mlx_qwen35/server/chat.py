"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_qwen35.engine.options import GenerationOptions, PromptOptions
from mlx_qwen35.server import asked
from mlx_qwen35.server.fields import Fields, read_body
from mlx_qwen35.server.history import read_messages
from mlx_qwen35.server.service import Answer, Event, Job, Service
from mlx_qwen35.server.spoken import Spoken, finish_reason, logprobs, refusal, usage
from mlx_qwen35.server.stream import COMMENT, event_stream, openai_stream, sse, unless_gone, with_silence


@dataclass
class Asked:
    """A request, read. usage: whether a stream tells it."""

    job: Job
    stream: bool
    usage: bool


async def chat(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request)
    wanted = await service.off_loop(lambda: read(body, service))
    answer = service.submit(wanted.job)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if wanted.stream:
        return event_stream(openai_stream(_chunks(answer, head, wanted)))
    made = await unless_gone(request, _whole(answer, head))
    return JSONResponse(made) if made else Response(status_code=499)


def read(body: Fields, service: Service) -> Asked:
    asked.check_model(body, service)
    stream, usage = asked.streaming(body)
    n = body.whole("n", 1, least=1, most=asked.MOST_ANSWERS)
    options = asked.sampling(body, service)
    options |= asked.most_tokens(body, "max_completion_tokens", "max_tokens") | asked.stops(body)
    options |= asked.thinking(body) | asked.tools(body) | asked.form(body) | _logprobs(body)
    options |= _continued(body) | body.option("loop_guard", GenerationOptions)
    asked.settle(body)
    messages = read_messages(body, service)
    with body.naming("messages"):
        return Asked(service.prepare(messages, n, **options), stream, usage)


def _logprobs(body: Fields) -> dict[str, Any]:
    wanted, top = body.flag("logprobs", False), body.whole("top_logprobs", 0, least=0, most=asked.MOST_TOP)
    if top and not wanted:
        raise body.error("top_logprobs", "must be given with logprobs", code="option_no_effect")
    return {"logprobs": True, "top_logprobs": top} if wanted else {}


def _continued(body: Fields) -> dict[str, Any]:
    options = body.option("continue_final_message", PromptOptions)
    if body.flag("add_generation_prompt", None) is options.get("continue_final_message", False):
        rule = "must be the opposite of continue_final_message"
        raise body.error("add_generation_prompt", rule, code="option_conflict")
    return options


async def _whole(answer: Answer, head: dict[str, Any]) -> dict[str, Any]:
    spoken = [Spoken() for _ in answer.results]
    async for event in answer:
        spoken[event.choice].deltas(event.pieces)
        if event.result and (error := refusal(event.result)):
            raise error
    choices = []
    for index, (said, result) in enumerate(zip(spoken, answer.results, strict=True)):
        assert result
        told = logprobs(result.logprobs) if result.logprobs is not None else None
        choices.append(
            {"index": index, "message": said.message, "logprobs": told, "finish_reason": finish_reason(result)}
        )
    return head | {"object": "chat.completion", "choices": choices, "usage": usage(answer.results)}


async def _chunks(answer: Answer, head: dict[str, Any], wanted: Asked) -> AsyncGenerator[str]:
    """Role of each choice, what it says, and its finish_reason in a chunk of its own; usage in the end."""
    head = head | {"object": "chat.completion.chunk"} | ({"usage": None} if wanted.usage else {})
    spoken = [Spoken() for _ in answer.results]
    for index in range(len(spoken)):
        yield sse(head | {"choices": [_choice(index, {"role": "assistant", "content": ""})]})
    async with aclosing(with_silence(aiter(answer))) as events:
        async for event in events:
            if event is None:
                yield COMMENT
                continue
            for choice in _said(event, spoken[event.choice]):
                yield sse(head | {"choices": [choice]})
    if wanted.usage:
        yield sse(head | {"choices": [], "usage": usage(answer.results)})


def _said(event: Event, spoken: Spoken) -> list[dict[str, Any]]:
    """The choices of chunks that tell an event."""
    deltas = spoken.deltas(event.pieces) or [{}] * bool(event.logprobs)
    choices = [_choice(event.choice, delta) for delta in deltas]
    if event.logprobs:
        choices[0]["logprobs"] = logprobs(event.logprobs)
    if event.result:
        if error := refusal(event.result):
            raise error
        choices.append(_choice(event.choice, {}, finish_reason(event.result)))
    return choices


def _choice(index: int, delta: dict[str, Any], ended: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": ended}
