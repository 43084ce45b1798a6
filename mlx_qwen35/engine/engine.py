"""The engine: any number of sequences on one model, step by step. The one loop that every generation goes through."""

import threading
import time
from collections import deque
from collections.abc import Sequence as Many

import mlx.core as mx

from mlx_qwen35.engine.media import MediaEncoder
from mlx_qwen35.engine.rows import Rows
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.machine.memory import set_limits
from mlx_qwen35.model.model import Model

CLEAR_EVERY = 256  # passes between returning MLX's unused buffers to the system

_ONE = threading.RLock()  # engines in several threads take turns


class Engine:
    """Runs sequences: `add` them, and call `step` until all are finished. Any thread may call any method.

    What a sequence gets depends on its prompt, options and seed alone, whoever runs beside it.

    Args:
        interleave: whether running sequences get their tokens between two chunks of a prompt. Otherwise all prompts
            that wait are prefilled first.
    """

    def __init__(self, model: Model, interleave: bool = False):
        self.model, self.interleave = model, interleave
        self.waiting: deque[Sequence] = deque()  # for their prefill, the first one is under way
        self._ready: list[Sequence] = []  # prefilled, and not among the running rows yet
        self._rows = Rows(model)
        self._media = MediaEncoder(model)
        self._untaken: list[deque[int]] = []  # of each row: tokens of its last pass
        self._left = time.perf_counter()  # when the last step ended
        self._passes = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self._ready or self._rows.sequences)

    def add(self, *sequences: Sequence) -> None:
        """Take in sequences. They are prefilled in the order of their arrival."""
        with _ONE:
            set_limits(self.model.memory_limit)
            for sequence in sequences:
                self._media.expect(sequence.prompt)
                self.waiting.append(sequence)

    def step(self) -> list[Sequence]:
        """Do a bounded piece of work: one token for each running sequence, one chunk of a prompt, or both.

        No sequence gets more than one token.

        Returns the sequences that have a new token or are finished. An error of a sequence ends that sequence. Any
        other exception, as KeyboardInterrupt, ends the running ones, each with the tokens that it has.
        """
        with _ONE:
            paused = time.perf_counter() - self._left
            try:
                decodes = self.interleave or not self.waiting
                news = self._decode(paused) if decodes else []
                news += self._prefill()
            except BaseException:
                self._abandon()
                raise
            finally:
                self._left = time.perf_counter()
            return news

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now, with the tokens that it has. Its memory is free when this returns, or after one step."""
        with _ONE:
            if sequence.finished:
                return
            sequence.finish("interrupted")
            if sequence in self.waiting:
                self.waiting.remove(sequence)
                self._media.forget(sequence.prompt)
                sequence.end(self.model, None)
            elif sequence in self._ready:
                self._ready.remove(sequence)
                sequence.end(self.model, None)
            elif not self._pending:
                self._settle()

    # --- the parts of a step ---

    def _prefill(self) -> list[Sequence]:
        """One chunk of the oldest prompt that waits; behind the last chunk its first token."""
        if not self.waiting:
            return []
        sequence = self.waiting[0]
        try:
            hidden = sequence.prefill(self.model, self._media.encode)
            if hidden is None:
                return []
            self._rows.begin(sequence, hidden)
        except Exception as error:
            sequence.fail(error)
        self.waiting.popleft()
        if sequence.finished:
            self._media.forget(sequence.prompt)
            sequence.end(self.model, None)
        else:
            self._ready.append(sequence)
        return [sequence]

    def _decode(self, paused: float) -> list[Sequence]:
        """A token for each running sequence: one that the last pass left over, or of a new pass."""
        rows = self._rows
        if self._ready and rows.current is None:
            rows.join(self._ready)
            self._ready = []
        if not rows.sequences:
            return []
        if not self._pending:
            self._untaken = list(map(deque, rows.run(paused, ahead=not self._ready)))
            self._passes += 1
        news = [sequence for sequence in rows.sequences if sequence.error]
        for row, (sequence, tokens) in enumerate(zip(rows.sequences, self._untaken, strict=True)):
            if tokens and not sequence.finished:
                rows.hand(row, tokens.popleft())
                news.append(sequence)
        if not self._pending:
            self._settle()
        if self._passes % CLEAR_EVERY == 0:
            mx.clear_cache()
        return news

    @property
    def _pending(self) -> bool:
        """Whether a running sequence has tokens of the last pass left."""
        return any(tokens and not s.finished for s, tokens in zip(self._rows.sequences, self._untaken, strict=False))

    def _settle(self) -> None:
        """Behind a pass: keep what was taken of it, and let the finished go."""
        rows, self._untaken = self._rows, []
        rows.settle()
        if finished := [row for row, sequence in enumerate(rows.sequences) if sequence.finished]:
            self._retire(finished)

    def _retire(self, finished: Many[int]) -> None:
        sequences = [self._rows.sequences[row] for row in finished]
        for sequence, cache in zip(sequences, self._rows.leave(finished), strict=True):
            sequence.end(self.model, cache)

    def _abandon(self) -> None:
        """End all that run, after an exception in the middle of a step."""
        for sequence in (*self._rows.sequences, *self._ready, *list(self.waiting)[:1]):
            self.cancel(sequence)
