"""The answers that wait for memory and those that run, on the engine thread: admitted in order, each told its end once.

An answer is a lane from its arrival to its last event. Whatever ends it (its last token, a cancel, a limit, an error)
leaves no other lane changed.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.budget.rows import RowNeeds
from mlx_qwen35.cache.prefix import PrefixLibrary, Use
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, choose_drafts
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.logprobs import TokenLogprob
from mlx_qwen35.engine.options import draft_options
from mlx_qwen35.engine.prepared import Prepared
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.piece import Piece
from mlx_qwen35.server.admission import GROWN, Admission
from mlx_qwen35.server.errors import RETRY, ApiError

LOG = logging.getLogger("mlx_qwen35.server")
NEAR = 16  # tokens before the end of what is reserved at which more is reserved: a pass gives a few


class Event(NamedTuple):
    """What is new of one choice. The last event of each has its result, and no other has one."""

    choice: int
    pieces: Sequence[Piece] = ()
    logprobs: Sequence[TokenLogprob] = ()  # of the new tokens, where asked for
    result: Result | None = None


@dataclass(eq=False)
class Lane:
    """One answer. owner: whoever cancels it. tell: takes its events. until: when it ends, on the lanes' clock."""

    owner: object
    prepared: Prepared
    choice: int
    needs: RowNeeds
    tell: Callable[[Event], None]
    until: float = float("inf")
    request: Request | None = None  # once it is admitted
    kept: Use | None = None  # keeps what the library has of its prompt, until it is read
    told: int = 0  # log-probabilities
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def room(self) -> RowNeeds:
        """What it needs now."""
        return replace(self.needs, waits=not (self.request and self.request.tokens))

    @property
    def limit(self) -> int:
        """Most tokens of the answer."""
        return self.prepared.plans[self.choice].limit

    def refuse(self, error: Exception | None, reason: str = "interrupted") -> None:
        """Tell its end before it has begun."""
        self.tell(Event(self.choice, result=self.prepared.unbegun(self.choice, reason, error)))


class Lanes:
    """All lanes of one loaded model."""

    def __init__(
        self,
        model: Model,
        library: PrefixLibrary,
        admission: Admission,
        rows: int,
        clock: Callable[[], float],
    ):
        """rows: most answers at a time."""
        self.model, self.library, self.admission, self.rows, self.clock = model, library, admission, rows, clock
        self.engine = Engine(model, interleave=True, clock=clock)
        self.queue: deque[Lane] = deque()
        self.running: dict[int, Lane] = {}  # by id of the request
        self.waiting = 0  # owners none of whose lanes has run

    @property
    def idle(self) -> bool:
        return not (self.queue or self.running)

    def add(self, lanes: Sequence[Lane]) -> None:
        """Take in the lanes of one owner."""
        self.queue += lanes
        self._count()

    def turn(self) -> None:
        """End what is out of time, admit what there is room for, and do one step of the engine."""
        try:
            now = self.clock()
            for lane in [lane for lane in self._all() if lane.until <= now]:
                self._expire(lane)
            self._admit()
            self._count()
            self._grow()
            for request in self.engine.step():
                self._tell(self.running[id(request)])
        except Exception as error:
            LOG.exception("the engine failed; the answers that ran have ended, those that wait go on")
            self._fail(error)

    def drop(self, owner: object) -> None:
        """End the lanes of an owner, with what they have."""
        for lane in [lane for lane in self._all() if lane.owner is owner]:
            self.end(lane)
        self._count()

    def close(self, queued: Exception) -> None:
        """End all: what runs with what it has, what waits with an error."""
        for lane in list(self._all()):
            self.end(lane, None if lane.request else queued)
        self._count()

    def end(self, lane: Lane, error: Exception | None = None, reason: str = "interrupted") -> None:
        """End a lane wherever it is. error: what it ends with instead of what it has."""
        if lane.request is None:
            self.queue.remove(lane)
            lane.refuse(error, reason)
            return
        self.engine.cancel(lane.request, reason)
        if error:
            lane.request.fail(error)
        self._tell(lane)

    # --- parts of a turn ---

    def _all(self) -> Iterator[Lane]:
        yield from (*self.running.values(), *self.queue)

    def _count(self) -> None:
        begun = {id(lane.owner) for lane in self.running.values()}
        self.waiting = len({id(lane.owner) for lane in self.queue if not lane.choice} - begun)

    def _expire(self, lane: Lane) -> None:
        if lane.request and lane.request.tokens:
            self._cut(lane, "timeout")
            return
        kept = "; what was read of it is kept for a while" if lane.request else ""
        message = f"the request was not answered within the server's --timeout{kept}"
        self.end(lane, ApiError(503, "request_timeout", message, headers=RETRY))

    def _cut(self, lane: Lane, limited_by: str) -> None:
        """End an answer that has tokens as a limit does."""
        assert lane.request
        lane.request.limited_by = limited_by
        self.end(lane, reason="length")

    def _admit(self) -> None:
        """Begin lanes in the order of the queue, as far as there is room."""
        while self.queue and len(self.running) < self.rows:
            lane = self.queue[0]
            try:
                if not self._begin(lane):
                    return
            except Exception as error:
                self.end(lane, error)

    def _begin(self, lane: Lane) -> bool:
        """Begin a lane, with drafts if they have room; whether it has."""
        mode, depth = draft_options(lane.prepared.options)
        drafts = choose_drafts(self.model, mode, depth, len(self.running) + 1, lane.limit)
        policies = [drafts]
        if drafts.depth and not drafts.fixed:
            policies.append(DraftPolicy(0, reason="memory has no room for drafts beside the other answers", short=True))
        kept = self.library.keep(lane.prepared.prefix)
        for drafts in policies:
            needs = replace(lane.needs, depth=drafts.depth)
            if self._has_room([*(other.room for other in self.running.values()), needs], kept):
                break
        else:
            if self.running:
                return False
            self.library.clear()  # alone it fits, as was checked when it came
        request = lane.prepared.request(lane.choice, self.admission.plan.chunk(needs.prompt), drafts, self.library)
        self.queue.popleft()
        lane.needs, lane.kept, lane.request = needs, kept, request
        self.running[id(lane.request)] = lane
        self.engine.add(lane.request)
        if lane.choice + 1 == len(lane.prepared.plans):  # the answers to a prompt begin in their order
            lane.prepared.let_go()
        return True

    def _has_room(self, rows: Sequence[RowNeeds], *coming: Use) -> bool:
        """Whether there is room for rows. coming: of what has not begun."""
        uses = [*coming, *(lane.kept for lane in self.running.values() if lane.kept)]
        shared = [array for use in uses for array in _goes_on_in(use)]
        return self.admission.make_room(rows, self.library, [*self.engine.held(), *shared])

    def _grow(self) -> None:
        """Reserve more for answers that near the end of theirs; without room the youngest of no stated length ends."""
        for lane in [lane for lane in self.running.values() if self._is_near(lane)]:
            more = replace(lane.needs, answer=min(lane.limit, lane.needs.answer + GROWN))
            while id(lane.request) in self.running:
                others = [other.room for other in self.running.values() if other is not lane]
                if self._has_room([*others, replace(more, waits=False)]):
                    lane.needs = more
                    break
                ends = [other for other in self.running.values() if other.prepared.open_ended and not other.room.waits]
                self._cut(max(ends, key=lambda other: other.number), "memory")

    def _is_near(self, lane: Lane) -> bool:
        assert lane.request
        tokens = len(lane.request.tokens)  # 0 while its prompt is read: it may have to wait for long
        return bool(tokens) and lane.limit > lane.needs.answer <= tokens + NEAR

    def _tell(self, lane: Lane) -> None:
        """Give what is new of a lane; behind its end its memory is the others'."""
        request = lane.request
        assert request
        new, lane.kept = tuple(request.logprobs[lane.told :]), None
        lane.told += len(new)
        result = request.result() if request.finished else None
        if result is not None:
            self.running.pop(id(request), None)
        lane.tell(Event(lane.choice, tuple(request.pieces()), new, result))
        if result is not None:
            self._has_room([other.room for other in self.running.values()])

    def _fail(self, error: Exception) -> None:
        """End all that run with an error, and begin with a new engine."""
        for lane in list(self.running.values()):
            assert lane.request
            lane.request.finish("interrupted")
            lane.request.fail(error)
            self._tell(lane)
        self.engine = Engine(self.model, interleave=True, clock=self.clock)


def _goes_on_in(use: Use) -> list[mx.array]:
    """The arrays of a snapshot that a prompt will go on in, so that they are its row's."""
    own = (entry for entry in use.kept.values() if len(entry.prefix) < len(use.prefix))
    entry = max(own, key=lambda entry: len(entry.prefix), default=None)
    return entry.snapshot.held() if entry and entry.snapshot.ends_its_arrays else []
