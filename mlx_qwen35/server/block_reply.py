"""How an answer is told block by block, streamed or not. Anthropic's API and OpenAI's responses fill in the words."""

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_qwen35.engine.result import Result
from mlx_qwen35.server.blocks import Blocks, Change
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.replies import refusal
from mlx_qwen35.server.service import Answer, Event, Job, Service
from mlx_qwen35.server.stream import SILENCE, event_stream, unless_gone, with_silence

LOG = logging.getLogger("mlx_qwen35.server")


class BlockReply(ABC):
    """An answer in the form of one API."""

    def __init__(self) -> None:
        self.blocks = Blocks()

    @abstractmethod
    def begin(self) -> str:
        """The first event of a stream."""

    @abstractmethod
    def quiet(self) -> str:
        """The event that says that there is nothing to say yet."""

    @abstractmethod
    def changed(self, change: Change) -> Iterator[str]:
        """The events of a change of a block."""

    @abstractmethod
    def end(self, result: Result) -> Iterator[str]:
        """The last events, behind those of the blocks."""

    @abstractmethod
    def failed(self, error: ApiError) -> str:
        """The last event in place of those."""

    @abstractmethod
    def whole(self, result: Result) -> dict[str, Any]:
        """The answer where nothing is streamed, and all blocks have ended."""

    async def answer(self, request: Request, job: Job, stream: bool) -> Response:
        """Take a job in and answer it. Raises ApiError while it can be told by a status."""
        service: Service = request.app.state.service
        answer = service.submit(job)
        if stream:
            return event_stream(self._streamed(answer))
        made = await unless_gone(request, self._made(answer))
        return JSONResponse(made) if made else Response(status_code=499)

    async def _streamed(self, answer: Answer) -> AsyncIterator[str]:
        """The stream. A client that leaves ends the answer, at the first event too."""
        try:
            async with aclosing(self.events(aiter(answer))) as events:
                async for told in events:
                    yield told
        finally:
            answer.cancel()

    async def events(self, answer: AsyncIterator[Event], silence: float = SILENCE) -> AsyncGenerator[str]:
        """The stream. silence: seconds without an event until `quiet` is told, which also comes at once."""
        yield self.begin()
        try:
            async with aclosing(with_silence(answer, silence)) as events:
                async for event in events:
                    if event is None:
                        yield self.quiet()
                        continue
                    for told in self._told(event):
                        yield told
        except Exception as error:
            if not isinstance(error, ApiError):
                LOG.exception("a stream failed")
            yield self.failed(ApiError.of(error))

    def _told(self, event: Event) -> Iterator[str]:
        for change in self.blocks.add(event.pieces):
            yield from self.changed(change)
        if event.result is not None:
            if error := refusal(event.result):
                raise error
            for change in self.blocks.end(cut_short(event.result)):
                yield from self.changed(change)
            yield from self.end(event.result)

    async def _made(self, answer: Answer) -> dict[str, Any]:
        async for event in answer:
            list(self._told(event))
        (result,) = answer.results
        assert result is not None
        return self.whole(result)


def cut_short(result: Result) -> bool:
    """Whether an answer is not whole. One that ends inside a call is not, whatever ended it."""
    return bool(result.cut) or result.finish_reason in ("length", "loop")
