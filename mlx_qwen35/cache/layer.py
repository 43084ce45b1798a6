"""What one layer remembers of a conversation, and what it is told of the tokens that it reads."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.kernels.gated_delta import DeltaState


class Span(NamedTuple):
    """The columns that one forward pass reads."""

    start: int  # columns already there
    lengths: mx.array | None  # (B,) real tokens of each row in this pass; None: all
    rotary: tuple[mx.array, mx.array]  # cos, sin of their positions
    mask: mx.array | str | None  # for attention: (B, 1, T, start + T) boolean, "causal", or None for one token
    stepwise: bool = False  # DeltaNet layers are to remember their memory after each token


class Place(NamedTuple):
    """How far a cache has come."""

    length: int  # columns: tokens and holes
    row_lengths: tuple[int, ...]  # tokens each row has read
    next_positions: tuple[int, ...]  # of the next token of each row; an image takes fewer than it has tokens
    real: mx.array | None  # (B, length) boolean, False at holes; None while there are none

    def after(self, T: int, counts: Sequence[int]) -> "Place":
        """Where T more columns lead, of which the first counts[i] of row i are tokens of text, the rest holes."""
        real = self.real
        if real is not None or min(counts) < T:
            before = mx.ones((len(counts), self.length), mx.bool_) if real is None else real
            real = mx.concatenate([before, mx.arange(T) < mx.array(list(counts))[:, None]], axis=1)
        return Place(
            self.length + T,
            tuple(n + m for n, m in zip(self.row_lengths, counts, strict=True)),
            tuple(n + m for n, m in zip(self.next_positions, counts, strict=True)),
            real,
        )


class KVCache:
    """Keys (normed and rotated) and values of one attention layer: (B, Hk, capacity, D), capacity in steps of STEP."""

    STEP = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.reserved = 0  # columns that are known to come

    def extend(self, keys: mx.array, values: mx.array, start: int) -> tuple[mx.array, mx.array]:
        """Write (B, Hk, T, D) at column `start` and return all columns up to there."""
        end = start + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self.keys, self.values = (
                self._grown(self.keys, keys, start, end),
                self._grown(self.values, values, start, end),
            )
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def arrays(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]

    def _grown(self, old: mx.array | None, like: mx.array, start: int, end: int) -> mx.array:
        capacity = -(-max(end, self.reserved) // self.STEP) * self.STEP
        B, H, _, D = like.shape
        if old is None or start == 0:
            return mx.zeros((B, H, capacity, D), like.dtype)
        return mx.concatenate([old[:, :, :start], mx.zeros((B, H, capacity - start, D), like.dtype)], axis=2)


class DeltaCache:
    """Window and state of one DeltaNet layer. Replaced as a whole by each pass, never changed in place."""

    def __init__(self, memory: DeltaState):
        self.memory = memory
        self.steps: DeltaState | None = None  # after each token of the last pass, if that was stepwise

    def replace(self, memory: DeltaState, stepwise: bool) -> None:
        """Take what a pass left: the memory after its last token, or if stepwise after each, (B, T, ...)."""
        self.steps = memory if stepwise else None
        self.memory = DeltaState(*(array[:, -1] for array in memory)) if stepwise else memory

    def keep(self, counts: Sequence[int]) -> None:
        """Go back, in each row, to the memory after so many tokens of the last pass; after none where it had none."""
        assert self.steps is not None, "the last pass was not stepwise"
        last = [max(0, count - 1) for count in counts]
        if len(set(last)) == 1:
            self.memory = DeltaState(*(array[:, last[0]] for array in self.steps))
        else:
            self.memory = DeltaState(*(array[mx.arange(len(last)), mx.array(last)] for array in self.steps))
        self.steps = None

    def arrays(self) -> list[mx.array]:
        return list(self.memory)
