"""How requests of OpenAI's two ways to complete are answered, streamed or not."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_qwen35.engine.result import Result
from mlx_qwen35.server.errors import ApiError, closing
from mlx_qwen35.server.service import Answer, Event, Job, Service, failed
from mlx_qwen35.server.stream import event_stream, openai_stream, sse, unless_gone, with_silence

Choice = dict[str, Any]  # of a chunk, or of a whole answer
_TOLD = 1.0  # seconds until a stream tells how far the prompt is read


class Growing(Protocol):
    """One choice as it grows."""

    def opening(self) -> list[Choice]:
        """What a stream has of it before anything came."""

    def said(self, event: Event) -> list[Choice]:
        """What an event adds, for a stream, without its end."""

    def ending(self, finish_reason: str) -> Choice:
        """The last that a stream has of it."""

    def whole(self, result: Result, finish_reason: str) -> Choice:
        """It as one, where nothing is streamed."""


class Kind(NamedTuple):
    """What tells the two ways apart."""

    prefix: str  # of ids
    whole: str  # names of objects
    chunk: str
    choice: type  # Growing, made of its index


@dataclass
class Wanted:
    """A request, read. usage: whether a stream tells it."""

    jobs: Sequence[Job]
    stream: bool
    usage: bool


async def reply(request: Request, wanted: Wanted, kind: Kind) -> Response:
    """Take a request in and answer it. Raises ApiError while it can be told by a status."""
    service: Service = request.app.state.service
    answers = [service.submit(job) for job in wanted.jobs]
    head = {"id": f"{kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
    head["model"] = wanted.jobs[0].model
    if wanted.stream:
        return event_stream(openai_stream(_chunks(answers, head | {"object": kind.chunk}, kind, wanted.usage)))
    made = await unless_gone(request, _whole(answers, head | {"object": kind.whole}, kind))
    return JSONResponse(made) if made else Response(status_code=499)


async def _events(answers: Sequence[Answer]) -> AsyncGenerator[Event]:
    """The events of all, one answer behind the other. Their choices are numbered through."""
    first = 0
    for answer in answers:
        async for event in answer:
            if event.result is not None and (error := refusal(event.result)):
                raise error
            yield event._replace(choice=first + event.choice)
        first += len(answer.results)


async def _whole(answers: Sequence[Answer], head: dict[str, Any], kind: Kind) -> dict[str, Any]:
    growing = _growing(answers, kind)
    async for event in _events(answers):
        growing[event.choice].said(event)
    results = [result for answer in answers for result in answer.results if result is not None]
    choices = [choice.whole(result, finish_reason(result)) for choice, result in zip(growing, results, strict=True)]
    return head | {"choices": choices, "usage": usage(answers)}


async def _chunks(answers: Sequence[Answer], head: dict[str, Any], kind: Kind, told: bool) -> AsyncGenerator[str]:
    """What each choice says, and its finish_reason in a chunk of its own; usage in the end, if it is told."""
    head = head | ({"usage": None} if told else {})
    growing = _growing(answers, kind)
    for choice in [chunk for one in growing for chunk in one.opening()]:
        yield sse(head | {"choices": [choice]})
    async with aclosing(with_silence(_events(answers), _TOLD)) as events:
        async for event in events:
            if event is None:
                yield _how_far(answers)
                continue
            choices = growing[event.choice].said(event)
            if event.result is not None:
                choices.append(growing[event.choice].ending(finish_reason(event.result)))
            for choice in choices:
                yield sse(head | {"choices": [choice]})
    if told:
        yield sse(head | {"choices": [], "usage": usage(answers)})


def _how_far(answers: Sequence[Answer]) -> str:
    """A comment: how many tokens of the prompts are read. The page shows it; other clients pass over comments."""
    read, total = [answer.read for answer in answers], sum(answer.job.prompt_tokens for answer in answers)
    waits = all(tokens is None for tokens in read)
    return ": waiting\n\n" if waits else f": reading {sum(tokens or 0 for tokens in read)} of {total}\n\n"


def _growing(answers: Sequence[Answer], kind: Kind) -> list[Growing]:
    return [kind.choice(index) for index in range(sum(len(answer.results) for answer in answers))]


def finish_reason(result: Result) -> str:
    """OpenAI has no name for an answer that went round in circles, or ended inside a call: it is not whole."""
    return "length" if result.cut or result.finish_reason == "loop" else result.finish_reason


def refusal(result: Result) -> ApiError | None:
    """Why an answer has no end of its own, if it has none."""
    if result.finish_reason == "interrupted" and not result.error:
        return closing()
    return failed(result)


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens of all choices. A prompt counts once, however many choices it has."""
    done = [[result for result in answer.results if result is not None] for answer in answers]
    results = [result for results in done for result in results]
    prompt = sum(results[0].prompt_tokens for results in done)
    completion = sum(result.generation_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(results[0].cached_tokens for results in done)},
        "completion_tokens_details": {"reasoning_tokens": sum(result.reasoning_tokens for result in results)},
    }
