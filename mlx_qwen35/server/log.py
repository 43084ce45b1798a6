"""One line of counts for each request, on standard error. Text of prompts and answers only with --log-text.

A line holds no key, no query, no data: URI and no address of an image; a failure of the server is told by its kind and
place, since its words may hold text.
"""

import asyncio
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_qwen35.engine.result import Result
from mlx_qwen35.server.errors import ApiError, closing
from mlx_qwen35.server.fields import plain_name
from mlx_qwen35.server.guard import refusal
from mlx_qwen35.server.service import ANSWERS, Answer, failed
from mlx_qwen35.server.status import Metrics

LOG = logging.getLogger("mlx_qwen35.server")
_MEDIA = ("url", "image_url", "video_url", "data", "file_data")  # fields that hold images and videos, or where they are
SILENT = ("/page/", "/health", "/metrics")  # paths without a line: files of the page, and what is asked all the time


def to_stderr(with_text: bool) -> None:
    """Have the server's lines, warnings, and errors of uvicorn written to standard error."""
    handler = _Stderr()
    handler.setFormatter(_Lines(with_text))
    for name, level in ((LOG.name, logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    warnings.showwarning = lambda message, *_, **__: LOG.warning("%s", message)  # no line of the program with it


class _Stderr(logging.StreamHandler[TextIO]):
    """Where its standard error was closed it goes on with the present one."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream.closed:
            self.stream = sys.stderr
        super().emit(record)


class _Lines(logging.Formatter):
    """Begins with the time; an exception is told without its words, unless with_text."""

    def __init__(self, with_text: bool):
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._with_text = with_text

    def formatException(self, ei: Any) -> str:
        if self._with_text:
            return super().formatException(ei)
        kind, _, trace = ei
        return "".join([*traceback.format_tb(trace), kind.__name__])


class Log:
    """Outermost of the application: it sees every request, its end, and every failure."""

    def __init__(self, app: ASGIApp, metrics: Metrics, with_text: bool):
        self._app, self._metrics, self._with_text = app, metrics, with_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), 0
        answers: list[Answer] = []
        ANSWERS.set(answers)

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:  # the server closes
            if not status:
                await refusal(scope, closing())(scope, receive, watched)
        except Exception as error:
            LOG.exception("a request failed")
            if not status:  # otherwise the connection ends without the rest
                await refusal(scope, error)(scope, receive, watched)
        finally:
            for answer in answers:
                await answer.leave()  # what a request has begun ends with it
            self._metrics.count(scope, status, answers, began)
            counts, seconds = _refused(scope) + _counts(answers), time.monotonic() - began
            if status >= 400 or not scope["path"].startswith(SILENT):
                LOG.info("%s %s %d %s%.2f s", scope["method"], _shown(scope["path"]), status, counts, seconds)
            if self._with_text:
                self._tell_text(scope, answers)

    def _tell_text(self, scope: Scope, answers: Sequence[Answer]) -> None:
        if "json" in scope:
            LOG.info("  asked: %s", json.dumps(_without_media(scope["json"]), ensure_ascii=False))
        for result in (result for answer in answers for result in answer.results if result is not None):
            LOG.info("  answered: %s", json.dumps([result.reasoning, result.text], ensure_ascii=False))


def _refused(scope: Scope) -> str:
    """ "invalid_value messages.0.role, " for a request that was refused."""
    error: ApiError | None = scope.get("refused")
    if not error:
        return ""
    return " ".join(filter(None, (error.code, plain_name(error.param or "")))) + ", "


def _counts(answers: Sequence[Answer]) -> str:
    """ "12 in (8 cached), 40 out, stop, " for the answers of a request; one whose client left has "left". Before it
    stands "adapter NAME, " where one answered.
    """
    if not answers:
        return ""
    results = [result for answer in answers for result in answer.results]
    ended = [result for result in results if result is not None]
    tokens = sum(answer.job.prompt_tokens for answer in answers)
    cached = max((result.cached_tokens for result in ended), default=0)
    out = sum(result.generation_tokens for result in ended)
    ends = dict.fromkeys(_end(answer, result) for answer in answers for result in answer.results)
    adapter = answers[0].job.prepared.adapter  # of all
    by = f"adapter {adapter}, " if adapter else ""
    return f"{by}{tokens} in ({cached} cached), {out} out, {' '.join(ends)}, "


def _end(answer: Answer, result: Result | None) -> str:
    """Why an answer has ended; of a length what set it."""
    if result is None or (answer.left and result.finish_reason == "interrupted"):
        return "left"
    if error := failed(result):
        return error.code
    return f"length ({result.limited_by})" if result.finish_reason == "length" else result.finish_reason


def _shown(path: str) -> str:
    """A path of a client as one short word."""
    return ascii(path[:80])[1:-1].replace(" ", "%20")


def _without_media(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _told(item) if name in _MEDIA else _without_media(item) for name, item in value.items()}
    return [_without_media(item) for item in value] if isinstance(value, list) else value


def _told(medium: Any) -> Any:
    return f"{len(medium):,} characters" if isinstance(medium, str) else _without_media(medium)
