"""The engine thread: it owns the model, and takes requests from the event loop.

A request is made ready (`prepare`: template, pixels, grammar) on another thread, admitted (`submit`), and then runs
among others. `Answer` gives its events to the event loop.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import Given, start
from mlx_qwen35.engine.logprobs import TokenLogprob
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.piece import Piece
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.idle import Upkeep
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.report import Parted

LOG = logging.getLogger("mlx_qwen35.server")
T = TypeVar("T")
ANSWERS: ContextVar[list["Answer"]] = ContextVar("answers")  # to the HTTP request at hand, for its line in the log


class Event(NamedTuple):
    """What is new of one choice. The last event of each has its result, and no other has one."""

    choice: int
    pieces: Sequence[Piece] = ()
    logprobs: Sequence[TokenLogprob] = ()  # of the new tokens, where asked for
    result: Result | None = None


@dataclass
class Job:
    """A request that was checked and made ready."""

    prompt: Given
    options: dict[str, Any]  # of generate
    n: int = 1  # answers to it; number i has seed + i
    requests: list[Request] = field(default_factory=list)
    parted: Parted | None = None  # where much of the prompt is read again, though it was read before

    @property
    def prompt_tokens(self) -> int:
        return len(self.requests[0].prompt.tokens)


class Answer:
    """The answers to a job, as they come: an asynchronous iterator of events. Leaving it cancels what still runs."""

    def __init__(self, service: "Service", job: Job, loop: asyncio.AbstractEventLoop):
        self.job, self._service, self._loop = job, service, loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.results: list[Result | None] = [None] * job.n
        self.first_at: float | None = None  # when its first text came, on time.monotonic()'s clock

    def put(self, event: Event) -> None:
        """Give an event, from any thread."""
        if event.pieces and self.first_at is None:
            self.first_at = time.monotonic()
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while None in self.results:
                event = await self._events.get()
                if event.result:
                    self.results[event.choice] = event.result
                yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End what still runs. Its memory is free within a step."""
        if None in self.results:
            self._service.do(lambda: self._service.drop(self))


class Service:
    """One model, served.

    Args:
        model, processor: from `load`.
        name: what the API calls the model.
        reload: loads the model again, for --idle-unload.
        upkeep: what Upkeep is given beside, for tests.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        options: ServerOptions,
        name: str,
        reload: Callable[[], Model] | None = None,
        **upkeep: Any,
    ):
        self.model, self.processor, self.options, self.name = model, processor, options, name
        self.library = model.make_library()
        self.upkeep = Upkeep(model, processor, self.library, options, reload, **upkeep)
        self._pool = ThreadPoolExecutor(2, "prepare")
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._engine = Engine(model, interleave=True)
        self._running: dict[int, tuple[Answer, int, Request, int]] = {}  # by id of the request
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End what runs, with "interrupted", and the thread."""
        self._commands.put(None)
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)
        self.upkeep.close()

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Do what takes its time and needs no MLX: templates, pixels, grammars."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def prepare(self, prompt: Given, n: int = 1, **options: Any) -> Job:
        """Check a prompt and its options and make them ready. For `off_loop`. Raises InputError."""
        options["library"] = self.library
        requests = start(self.model, self.processor, [prompt] * n, **options).requests
        return Job(prompt, options, n, requests, self.upkeep.prepared(requests[0].prompt, prompt, options.get("tools")))

    def submit(self, job: Job) -> Answer:
        """Take a job in. From the event loop. ApiError: 400 for what never fits, 429 where too many wait."""
        self.upkeep.check()
        answer = Answer(self, job, asyncio.get_running_loop())
        ANSWERS.get([]).append(answer)
        self.do(lambda: self._add(answer))
        return answer

    def do(self, command: Callable[[], None]) -> None:
        """Have the engine thread do something between two steps."""
        self._commands.put(command)

    # --- on the engine thread ---

    def _run(self) -> None:
        while True:
            self.upkeep.tick(not self._engine.idle)
            try:
                command = self._commands.get(self._engine.idle, self.upkeep.every)
            except queue.Empty:
                self._step()
                continue
            if command is None:
                break
            command()
        for answer, *_ in list(self._running.values()):
            self.drop(answer)

    def _add(self, answer: Answer) -> None:
        for choice, request in enumerate(answer.job.requests):
            self._running[id(request)] = (answer, choice, request, 0)
            try:
                self.upkeep.wake()
                self._engine.add(request)
            except Exception as error:
                request.fail(error)
                self._tell(request)

    def _step(self) -> None:
        for request in self._engine.step():
            self._tell(request)

    def _tell(self, request: Request) -> None:
        answer, choice, _, told = self._running[id(request)]
        new = tuple(request.logprobs[told:])
        result = request.result() if request.finished else None
        answer.put(Event(choice, tuple(request.pieces()), new, result))
        self._running[id(request)] = (answer, choice, request, told + len(new))
        if result:
            del self._running[id(request)]

    def drop(self, answer: Answer) -> None:
        """End what still runs of an answer."""
        for other, _, request, _ in list(self._running.values()):
            if other is answer:
                self._engine.cancel(request)
                self._tell(request)


def failed(result: Result) -> ApiError | None:
    """The refusal that an answer has ended with, if it has."""
    return ApiError.of(result.error) if result.error else None
