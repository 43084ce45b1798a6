"""Which requests there is memory for: ever, now, and for how long an answer."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import mlx.core as mx

from mlx_qwen35.budget.rows import RowNeeds
from mlx_qwen35.cache.prefix import PrefixLibrary, library_bytes
from mlx_qwen35.checkpoint.config import VisionConfig
from mlx_qwen35.engine.drafts.speculate import DraftPolicy
from mlx_qwen35.engine.plan import refuse_memory
from mlx_qwen35.engine.prepared import Prepared
from mlx_qwen35.engine.room import encoding_bytes, rows_plan
from mlx_qwen35.model.model import Model

ROWS = ((6e9, 2), (12e9, 4), (float("inf"), 8))  # answers at a time, up to so many bytes that a model may take
RESERVED = 4096  # tokens of an answer of no stated length that are reserved when it begins
GROWN = 1024  # and that many more when it comes near their end


def default_rows(limit: int) -> int:
    """Answers at a time, where a model may take `limit` bytes."""
    return next(rows for most, rows in ROWS if limit <= most)


class Admission:
    """The memory plan of a model that is served. It knows numbers alone, so any thread may ask."""

    def __init__(self, model: Model, vision: VisionConfig | None):
        self.vision, self.plan = vision, rows_plan(model)

    def needs(self, prepared: Prepared) -> RowNeeds:
        """What an answer is given room for when it begins. InputError where it does not even fit alone."""
        prompt, limit = prepared.prompt, prepared.plans[0].limit
        row = RowNeeds(len(prompt.tokens), limit, encoding=encoding_bytes(prompt, self.vision, self.plan.machine))
        least = replace(row, answer=1) if prepared.open_ended else row
        if not self.plan.fits([least]):
            room = min(self.plan.most(row.prompt, row.encoding), row.prompt + least.answer - 1)
            refuse_memory(prepared.options, room, [row.prompt], DraftPolicy(0), {})
        answers = (RESERVED >> halved for halved in range(RESERVED.bit_length()))
        given: Iterator[RowNeeds] = (replace(row, answer=min(limit, answer)) for answer in answers)
        return next(own for own in given if self.plan.fits([own])) if prepared.open_ended else row

    def make_room(self, rows: Iterable[RowNeeds], library: PrefixLibrary, held: Iterable[mx.array]) -> bool:
        """Whether there is room for these rows; a library keeps what is left beside them. held: arrays of rows now."""
        left = self.plan.machine.limit - self.plan.nbytes(list(rows), library.apart(held))
        if left < 0:
            return False
        library.memory = min(left, library_bytes(self.plan.machine.limit))
        library.trim()
        return True
