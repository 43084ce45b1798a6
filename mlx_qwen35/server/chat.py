"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import Fields
from mlx_qwen35.server.service import Answer, Job, Service, failed
from mlx_qwen35.server.stream import COMMENT, event_stream, sse, unless_gone, with_silence


def read(body: Fields, service: Service) -> tuple[Job, bool]:
    """The job of a request, and whether it is streamed."""
    options = {}
    if (most := body.whole("max_tokens", None, least=1)) is not None:
        options["max_tokens"] = most
    if (temp := body.number("temperature", None, least=0, most=2)) is not None:
        options["temp"] = temp
    messages, stream = body.items("messages"), body.flag("stream", False)
    body.ignore("model", "user")
    body.done()
    return service.prepare(messages, **options), stream


async def chat(request: Request) -> Response:
    service: Service = request.app.state.service
    body = Fields(await request.json())
    job, stream = await service.off_loop(lambda: read(body, service))
    answer = service.submit(job)
    if stream:
        return event_stream(_chunks(answer, service))
    made = await unless_gone(request, _whole(answer, service))
    return JSONResponse(made) if made else Response(status_code=499)


async def _whole(answer: Answer, service: Service) -> dict[str, Any]:
    async for _ in answer:
        pass
    choices = []
    for index, result in enumerate(answer.results):
        assert result
        if error := failed(result):
            raise error
        message = {"role": "assistant", "content": result.text, "reasoning_content": result.reasoning}
        choices.append({"index": index, "message": message, "finish_reason": result.finish_reason})
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()),
            "model": service.name, "choices": choices}  # fmt: skip


async def _chunks(answer: Answer, service: Service) -> AsyncIterator[str]:
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time()),
            "model": service.name}  # fmt: skip
    async for event in with_silence(aiter(answer)):
        if event is None:
            yield COMMENT
            continue
        for piece in event.pieces:
            delta = {"reasoning_content" if piece.reasoning else "content": piece.text}
            yield sse(head | {"choices": [{"index": event.choice, "delta": delta, "finish_reason": None}]})
        if event.result and (error := failed(event.result)):
            yield sse(ApiError.openai(error))
        elif event.result:
            ended = {"index": event.choice, "delta": {}, "finish_reason": event.result.finish_reason}
            yield sse(head | {"choices": [ended]})
    yield sse("[DONE]")
