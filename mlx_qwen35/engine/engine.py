"""The engine: any number of sequences on one model, step by step. The one loop that every generation goes through."""

import time
from collections import deque
from collections.abc import Callable

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.media import MediaEncoder
from mlx_qwen35.engine.prefill import ReadingSpeed
from mlx_qwen35.engine.rows import Rows
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.machine.memory import set_limits
from mlx_qwen35.machine.process import LOCK
from mlx_qwen35.model.model import Model

CHUNK_SECONDS = 0.5  # most of a chunk of a prompt while others decode
AIM = 0.8  # share of them that is aimed at: a chunk takes more a token than a longer one, or than the one before it
CLEAR_EVERY = 256  # passes between returning MLX's unused buffers to the system


class Engine:
    """Runs sequences: `add` them, and call `step` until all are finished. Any thread may call any method.

    What a sequence gets depends on its prompt, options and seed alone, whoever runs beside it. A callback of a sequence
    runs inside a step, so it must not wait for another thread that uses an engine.

    Args:
        interleave: whether running sequences get their tokens between two chunks of a prompt. Otherwise all prompts
            that wait are prefilled first. A chunk then takes CHUNK_SECONDS at most, by the clock that is given.
    """

    def __init__(self, model: Model, interleave: bool = False, clock: Callable[[], float] = time.perf_counter):
        self.model, self.interleave, self.clock = model, interleave, clock
        self.waiting: deque[Sequence] = deque()  # for their prefill, the first one is under way
        self._ready: list[Sequence] = []  # prefilled, and not among the running rows yet
        self._rows = Rows(model)
        self._media = MediaEncoder(model)
        self._speed = ReadingSpeed()
        self._decoded = time.perf_counter()  # when the last token was given
        self._paused = 0.0  # seconds since the last pass in which nothing was decoded
        self._passes = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self._ready or self._rows.sequences)

    def add(self, *sequences: Sequence) -> None:
        """Take in sequences, each of which runs once. They are prefilled in the order of their arrival."""
        with LOCK:
            set_limits(self.model.memory_limit)
            for sequence in sequences:
                sequence.start()
                self._media.expect(sequence)
                self.waiting.append(sequence)

    def step(self) -> list[Sequence]:
        """Do a bounded piece of work: one token for each running sequence, one chunk of a prompt, or both.

        Returns the sequences that have a new token or have ended in this step. An error of a sequence ends that
        sequence. Any other exception, as KeyboardInterrupt, ends the running ones, each with the tokens that it has.
        """
        with LOCK:
            try:
                decodes = self.interleave or not self.waiting
                changed = self._decode() if decodes else []
                changed += self._prefill()
                self._submit()
            except BaseException:
                self._abandon()
                raise
            return changed

    def cancel(self, sequence: Sequence, reason: str = "interrupted") -> None:
        """End a sequence of this engine now, with the tokens that it has. Its memory is free when this returns."""
        with LOCK:
            if sequence.finished:
                return
            sequence.finish(reason)
            if sequence in self._rows.sequences:
                self._retire()
            elif sequence in self.waiting or sequence in self._ready:
                self.waiting = deque(other for other in self.waiting if other is not sequence)
                self._ready = [other for other in self._ready if other is not sequence]
                self._end(sequence)
                sequence.close()
            self._submit()

    def held(self) -> list[mx.array]:
        """Every array of its sequences."""
        held = self._rows.arrays()
        for sequence in (*self._ready, *self.waiting):
            held += sequence.arrays()
        return held

    # --- the parts of a step ---

    def _decode(self) -> list[Sequence]:
        """A token for each running sequence: one that the last pass left over, or of a new pass."""
        rows = self._rows
        self._paused += time.perf_counter() - self._decoded
        if self._ready and rows.current is None:
            rows.join(self._ready)
            self._ready = []
        if not rows.sequences:
            return []
        if not any(rows.untaken):
            rows.run(self._paused, ahead=not self._ready)
            self._paused = 0.0
            self._passes += 1
            if self._passes % CLEAR_EVERY == 0:
                mx.clear_cache()
        changed = rows.take()
        self._retire()
        self._decoded = time.perf_counter()
        return changed

    def _prefill(self) -> list[Sequence]:
        """An image, or one chunk of the oldest prompt that waits; behind the last chunk its first token."""
        if not self.waiting:
            return []
        sequence = self._next()
        try:
            if not sequence.begun:
                sequence.begin(self.model)
            if not self._encode(sequence):
                self._read(sequence)
        except Exception as error:
            sequence.fail(error)
        if not (sequence.finished or sequence.tokens):
            return []
        if self.waiting and self.waiting[0] is sequence:  # it was not cancelled by its own progress
            self.waiting.popleft()
            if sequence.finished:
                self._end(sequence)
                sequence.close()
            else:
                self._ready.append(sequence)
        return [sequence]

    def _next(self) -> Sequence:
        """The oldest that waits. Once a prompt that one chunk finishes may go before it."""
        oldest, *others = self.waiting
        if self.interleave and others and oldest.begun and not oldest.passed:
            most = self._chunk(oldest)
            short = (s for s in others if s.prompt is not oldest.prompt and not s.prompt.media and s.to_read() <= most)
            if first := next(short, None):
                oldest.passed = first.passed = True
                self.waiting.remove(first)
                self.waiting.appendleft(first)
        return self.waiting[0]

    def _encode(self, sequence: Sequence) -> bool:
        """Encode images before a prompt is read; whether that was the work of this step, in which others wait."""
        if sequence.reading or not sequence.prompt.media:
            return False
        began = self.clock()
        if not self._media.encode(sequence):
            return False
        while not self.interleave and self._media.encode(sequence):
            pass
        sequence.clock.vision += self.clock() - began
        return self.interleave

    def _chunk(self, sequence: Sequence) -> int:
        """The most tokens of its next chunk: while others decode they must not wait for long."""
        if self.interleave and (self._rows.sequences or self._ready):
            return min(sequence.prefill_step_size, self._speed.within(AIM * CHUNK_SECONDS))
        return sequence.prefill_step_size

    def _read(self, sequence: Sequence) -> None:
        """One chunk of its prompt, and behind the last its first token."""
        most, began = self._chunk(sequence), self.clock()
        chunk = sequence.prefill(self.model, most, lambda: self._media.row(sequence))
        self._speed.measured(chunk.tokens, most, self.clock() - began)
        if sequence.is_read and not sequence.finished:
            self._rows.begin(sequence, chunk.hidden)

    def _retire(self) -> None:
        """Let the finished rows go; a pass under way goes on without them. Settle one whose tokens are all taken."""
        rows = self._rows
        gone = [row for row, sequence in enumerate(rows.sequences) if sequence.finished]
        if gone:
            self._leave(gone)
        if self._rows.current and self._rows.current.tokens and not any(self._rows.untaken):
            self._rows.settle()

    def _leave(self, gone: list[int]) -> None:
        rows = self._rows
        left = rows.select(gone)
        self._rows = rows.select([row for row in range(len(rows.sequences)) if row not in gone])
        left.settle()
        sequences, caches = left.sequences, left.caches()
        del left  # the library frees what the rows held
        while caches:
            sequence = sequences[-len(caches)]
            try:
                self._end(sequence, caches.pop(0))
            except Exception as error:  # its last token is fed here
                sequence.fail(error)
        for sequence in sequences:
            sequence.close()

    def _end(self, sequence: Sequence, cache: Cache | None = None) -> None:
        self._media.forget(sequence)
        sequence.end(self.model, cache)

    def _submit(self) -> None:
        """Submit all that is held: MLX computes a lazy array in no thread but the one that made it."""
        mx.async_eval(self.held())

    def _abandon(self) -> None:
        """End all that run, after an exception in the middle of a step."""
        for sequence in self._rows.sequences:
            sequence.finish("interrupted")
        self._retire()
        for sequence in (*self._ready, *list(self.waiting)[:1]):
            self.cancel(sequence)
