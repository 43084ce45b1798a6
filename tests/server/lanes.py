"""Lanes of these tests: on the test's own thread, with a clock that the test sets."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_qwen35.engine.prepared import Prepared, prepare
from mlx_qwen35.engine.result import Result
from mlx_qwen35.load import load
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.server.admission import Admission
from mlx_qwen35.server.lanes import Event, Lane, Lanes

QUESTION = "What is 34 + 58?"
ENDLESS = {"regex": "[ab]{9000}", "enable_thinking": False}  # an answer that only a limit ends


@dataclass
class Heard:
    """One answer as its client hears it."""

    lane: Lane
    events: list[Event] = field(default_factory=list)

    @property
    def results(self) -> list[Result]:
        """One, once it has ended."""
        return [event.result for event in self.events if event.result is not None]

    @property
    def result(self) -> Result:
        (result,) = self.results
        return result

    @property
    def text(self) -> str:
        return "".join(piece.text for event in self.events for piece in event.pieces if not piece.reasoning)


class Bench:
    """Lanes of nano, or of another model, and what came of them."""

    def __init__(self, rows: int = 4, limit: int | None = None, loaded: tuple[Model, Processor] | None = None):
        self.model, self.processor = loaded or nano()
        self.now = 0.0
        self.model.memory_limit, before = limit or self.model.memory_limit, self.model.memory_limit
        self.admission = Admission(self.model, self.processor.config.vision)
        self.lanes = Lanes(self.model, self.model.make_library(), self.admission, rows, lambda: self.now)
        self.model.memory_limit = before

    def prepare(self, prompt: Any, n: int = 1, **options: Any) -> Prepared:
        return prepare(self.model.config, self.processor, prompt, n, None, **options)

    def ask(self, prompt: Any = QUESTION, n: int = 1, until: float = float("inf"), **options: Any) -> list[Heard]:
        """Answers of one owner, in the queue."""
        prepared, heard, owner = self.prepare(prompt, n, **options), [], object()
        for choice in range(n):
            lane = Lane(owner, prepared, choice, self.admission.needs(prepared), lambda event: None, until)
            heard.append(Heard(lane))
            lane.tell = heard[-1].events.append
        self.lanes.add([own.lane for own in heard])
        return heard

    def run(self, until: Callable[[], bool] = lambda: False, most: int = 20_000) -> None:
        """Turns until a condition, or until nothing is left."""
        while not (self.lanes.idle or until()):
            self.lanes.turn()
            most -= 1
            assert most, "the lanes go on without end"


@functools.cache
def nano() -> tuple[Model, Processor]:
    return load("nano")
