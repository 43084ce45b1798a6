"""Server-sent events: a stream that keeps talking while the model reads, and ends when its client leaves."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from mlx_qwen35.server.errors import ApiError

LOG = logging.getLogger("mlx_qwen35.server")
T = TypeVar("T")
SILENCE = 5.0  # seconds until something is said


async def with_silence(events: AsyncIterator[T], seconds: float = SILENCE) -> AsyncGenerator[T | None]:
    """The items, and None at once and each time that so many seconds pass without one."""
    yield None
    waiting = asyncio.ensure_future(anext(events, _END))
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=seconds)
            if not done:
                yield None
                continue
            item = waiting.result()
            if item is _END:
                return
            yield item
            waiting = asyncio.ensure_future(anext(events, _END))
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        if close := getattr(events, "aclose", None):
            await close()


_END: Any = object()


def sse(data: Any, event: str | None = None) -> str:
    """One server-sent event. data: an object, or text as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {event}\n" if event else "") + f"data: {text}\n\n"


def event_stream(chunks: AsyncIterator[str]) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)


async def openai_stream(chunks: AsyncGenerator[str]) -> AsyncIterator[str]:
    """The chunks as OpenAI's streams end: with an event of the error, if there is one, and [DONE]."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except Exception as error:
        if not isinstance(error, ApiError):
            LOG.exception("a stream failed")
        yield sse(ApiError.of(error).openai())
    yield sse("[DONE]")


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What the work gives; None where the client left before, and the work was cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
