"""The engine thread: it owns the model, and takes requests from the event loop.

A request is made ready (`prepare`: template, pixels, grammar) on another thread, taken in (`submit`), and then runs
among others. `Answer` gives its events to the event loop.
"""

import asyncio
import contextlib
import gc
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx

from mlx_qwen35.budget.rows import RowNeeds
from mlx_qwen35.cache.prefix import PrefixLibrary
from mlx_qwen35.engine.generation import Given
from mlx_qwen35.engine.prepared import Prepared, prepare
from mlx_qwen35.engine.result import Result
from mlx_qwen35.model.lora import NONE, AdapterSet
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.server.admission import Admission, default_rows
from mlx_qwen35.server.errors import RETRY, ApiError, closing
from mlx_qwen35.server.idle import Upkeep
from mlx_qwen35.server.lanes import Event, Lane, Lanes
from mlx_qwen35.server.options import ServerOptions, spell_model_options

__all__ = ["ANSWERS", "Answer", "Event", "Job", "Service", "failed"]

LOG = logging.getLogger("mlx_qwen35.server")
T = TypeVar("T")
ANSWERS: ContextVar[list["Answer"]] = ContextVar("answers")  # to the HTTP request at hand, for its line in the log
QUEUE = 32  # jobs that may wait, or be made ready


@dataclass
class Job:
    """A request that was checked and made ready."""

    prepared: Prepared
    needs: RowNeeds  # of each answer
    until: float  # when it is out of time
    n: int = 1  # answers to it; number i has seed + i
    model: str = ""  # the id of the model, with its adapter

    @property
    def prompt_tokens(self) -> int:
        return len(self.prepared.prompt.tokens)


class Answer:
    """The answers to a job, as they come: an asynchronous iterator of events. Leaving it cancels what still runs."""

    def __init__(self, service: "Service", job: Job, loop: asyncio.AbstractEventLoop):
        self.job, self._service, self._loop = job, service, loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.results: list[Result | None] = [None] * job.n
        self.lanes: Sequence[Lane] = ()
        self.left = False  # whether the client did before its end
        self.first_at: float | None = None  # when its first text came, on time.monotonic()'s clock

    @property
    def read(self) -> int | None:
        """Tokens of the prompt that are read so far; None while the answers wait. From any thread."""
        return max((lane.request.read for lane in self.lanes if lane.request), default=None)

    def put(self, event: Event) -> None:
        """Give an event, from any thread."""
        if event.pieces and self.first_at is None:
            self.first_at = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while None in self.results:
                yield await self._next()
        finally:
            self.cancel()

    async def _next(self) -> Event:
        event = await self._events.get()
        if event.result is not None:
            self.results[event.choice] = event.result
        return event

    async def leave(self) -> None:
        """End what still runs, and wait until it has: the results tell what had come."""
        self.left = None in self.results
        self.cancel()
        while None in self.results:
            await self._next()

    def cancel(self) -> None:
        """End what still runs. Its memory is free within a step."""
        if None in self.results:
            self._service.drop(self)


class Service:
    """One model, served.

    Args:
        model, processor: from `load`.
        name: what the API calls the model.
        load: loads them again, where they were unloaded.
        clock: of timeouts.
        machine: what `Upkeep` sees of it.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        options: ServerOptions,
        name: str,
        load: Callable[[], tuple[Model, Processor]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        **machine: Any,
    ):
        self.processor, self.options, self.name = processor, options, name
        self.config = model.config
        self.models = _models(name, model.adapters)
        self.admission = Admission(model, processor.config.vision)
        self._load, self._clock = load, clock
        self.upkeep = Upkeep(model, processor, options, clock, **machine)
        self.rows = options.rows or default_rows(model.memory_limit)
        self._lanes: Lanes | None = self._lanes_of(model)
        # Where other servers are waited for, one that is slow must hold up nobody else.
        self._pool = ThreadPoolExecutor(QUEUE if options.fetch_media else 2, "prepare", spell_model_options)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._coming = 0  # jobs on their way to the engine thread
        self._preparing = 0  # what is done off the loop, which alone counts it
        self._ends = False  # whether the server does
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take nothing in any more, and end the thread. What runs is "interrupted", what waits is refused."""
        with self._lock:
            self._ends = True
        self.do(lambda: None)
        self._thread.join()
        self.upkeep.close()  # first, for who ends the server may have no patience
        self._pool.shutdown(cancel_futures=True)

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        window = self.config.max_position_embeddings
        return min(window, self.options.context or window)

    @property
    def default(self) -> str:
        """The model of a request that names none."""
        return next(iter(self.models))

    # --- from the event loop ---

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Do what takes its time and needs no MLX: templates, pixels, grammars. The model stays loaded meanwhile."""
        with self._lock:
            self._check_room()
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._preparing -= 1

    def prepare(self, prompt: Given, n: int = 1, model: str = "", **options: Any) -> Job:
        """Check a prompt and its options and make them ready. For `off_loop`. Raises InputError. Its time begins.

        model: one of `models`; "": `default`.
        """
        model = model or self.default
        until = self._clock() + (self.options.timeout or float("inf"))
        adapter = self.models[model]
        prepared = prepare(self.config, self.processor, prompt, n, self.context, adapter, **options)
        self.upkeep.prepared(self.library, prepared.prompt, prompt, options.get("tools"), adapter)
        return Job(prepared, self.admission.needs(prepared), until, n, model)

    def submit(self, job: Job) -> Answer:
        """Take a job in. From the event loop. ApiError 429 where too many wait, 503 where the server ends."""
        self.upkeep.check()
        answer = Answer(self, job, asyncio.get_running_loop())
        lanes = [Lane(answer, job.prepared, choice, job.needs, answer.put, job.until) for choice in range(job.n)]
        answer.lanes = lanes
        with self._lock:
            self._check_room()
            self._coming += 1
            self.do(lambda: self._add(lanes))
        ANSWERS.get([]).append(answer)
        return answer

    def _check_room(self) -> None:
        if self._ends:
            raise closing()
        free = 0 if self.waiting else max(0, self.rows - self.running)
        if self.waiting + self._coming + self._preparing >= QUEUE + free:
            message = f"{QUEUE} requests wait already, as many as may; ask again later"
            raise ApiError(429, "queue_full", message, headers=RETRY)

    def drop(self, answer: Answer) -> None:
        """End what still runs of an answer."""
        self.do(lambda: self._lanes.drop(answer) if self._lanes else None)

    def do(self, command: Callable[[], None]) -> None:
        """Have the engine thread do something between two steps."""
        self._commands.put(command)

    # --- figures ---

    @property
    def waiting(self) -> int:
        """Jobs of which nothing has begun."""
        lanes = self._lanes  # which the engine thread may unload
        return lanes.waiting if lanes else 0

    @property
    def running(self) -> int:
        """Answers that are read or generated."""
        lanes = self._lanes
        return len(lanes.running) if lanes else 0

    # --- the model ---

    @property
    def model(self) -> Model | None:
        """None while it is unloaded."""
        lanes = self._lanes
        return lanes.model if lanes else None

    @property
    def library(self) -> PrefixLibrary | None:
        """What remembers prompts; None while the model is unloaded."""
        lanes = self._lanes
        return lanes.library if lanes else None

    # --- on the engine thread ---

    def _lanes_of(self, model: Model) -> Lanes:
        library = model.make_library()
        self.upkeep.attach(library)
        return Lanes(model, library, self.admission, self.rows, self._clock)

    def _unload(self) -> None:
        if self._load and self._lanes and self._lanes.idle:
            self.upkeep.detach()
            self._lanes = None
            gc.collect()
            mx.clear_cache()

    def _run(self) -> None:
        spell_model_options()
        while not self._ends:
            self._try(self._next)
        while not self._commands.empty():
            self._try(self._commands.get())
        if self._lanes:
            self._lanes.close(closing())

    def _next(self) -> None:
        """A look at the machine, and a command, or else a turn."""
        idle = self._lanes is None or self._lanes.idle
        if self.upkeep.tick(not idle or self._preparing > 0, self.library):
            self._unload()
        command: Callable[[], None] | None = None
        with contextlib.suppress(queue.Empty):
            command = self._commands.get(idle, self.upkeep.every)
        if command:
            command()
        elif self._lanes:
            self._lanes.turn()

    def _try(self, work: Callable[[], None]) -> None:
        """Do something without which the thread can go on."""
        try:
            work()
        except Exception:
            LOG.exception("something between two steps failed")

    def _add(self, lanes: list[Lane]) -> None:
        with self._lock:
            self._coming -= 1
        if self._ends:
            return _refuse(lanes, closing())
        try:
            if self._lanes is None:
                assert self._load
                self._lanes = self._lanes_of(self.upkeep.loaded(self._load))
                self._lanes.library.recall(lanes[0].prepared.prefix)
        except Exception as error:
            LOG.exception("the model cannot be loaded again")
            return _refuse(lanes, error)
        self._lanes.add(lanes)


def _models(name: str, adapters: AdapterSet) -> dict[str, str]:
    """The ids of what can be asked for, with the name of each adapter. The model alone, which has NONE, comes first; it
    cannot be had where an adapter's whole tensors stand in it.
    """
    alone = {} if any(adapters[own].whole for own in adapters.names) else {name: NONE}
    return alone | {f"{name}:{own}": own for own in adapters.names}


def _refuse(lanes: list[Lane], error: Exception) -> None:
    for lane in lanes:
        lane.refuse(error)


def failed(result: Result) -> ApiError | None:
    """The refusal that an answer has ended with, if it has."""
    return ApiError.of(result.error) if result.error else None
