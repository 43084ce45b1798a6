"""The cache of one decoder layer, and the context of a forward pass."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.kernels.gated_delta import DeltaState


class ForwardContext(NamedTuple):
    """The T columns of one forward pass, for the layers."""

    start: int  # columns already in the cache
    lengths: mx.array | None  # (B,) tokens of each row in this pass; the rest is padding. None: no padding
    positions: mx.array  # (B, T), or (3, B, T) for the T, H and W axes
    mask: mx.array | str | None  # for attention: (B, 1, T, start + T) boolean, "causal", or None for one token
    stepwise: bool = False  # whether DeltaNet layers store their state after each token


class CachePosition(NamedTuple):
    """The position of a cache: what its rows hold."""

    length: int  # columns: tokens and padding
    row_lengths: tuple[int, ...]  # tokens of each row
    next_positions: tuple[int, ...]  # the next token's in each row; an image takes fewer positions than tokens
    mask: mx.array | None  # (B, length) boolean, False at padding. None: no padding

    def after(self, T: int, counts: Sequence[int]) -> "CachePosition":
        """The position after T more columns: in row i counts[i] tokens of text, then padding."""
        mask = self.mask
        if mask is not None or min(counts) < T:
            before = mx.ones((len(counts), self.length), mx.bool_) if mask is None else mask
            mask = mx.concatenate([before, mx.arange(T) < mx.array(list(counts))[:, None]], axis=1)
        return CachePosition(
            self.length + T,
            tuple(n + m for n, m in zip(self.row_lengths, counts, strict=True)),
            tuple(n + m for n, m in zip(self.next_positions, counts, strict=True)),
            mask,
        )


class KVCache:
    """Keys (normed and rotated) and values of one attention layer: (B, Hk, capacity, D), capacity in steps of STEP."""

    STEP = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.reserved = 0  # columns to allocate with the first

    def extend(self, keys: mx.array, values: mx.array, start: int) -> tuple[mx.array, mx.array]:
        """Write (B, Hk, T, D) at column `start` and return all columns up to the last one written."""
        end = start + keys.shape[2]
        if self.keys is None or self.values is None or end > self.keys.shape[2]:
            self.keys = self._grown(self.keys, keys, start, end)
            self.values = self._grown(self.values, values, start, end)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def arrays(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def _grown(self, old: mx.array | None, like: mx.array, start: int, end: int) -> mx.array:
        capacity = -(-max(end, self.reserved) // self.STEP) * self.STEP
        B, H, _, D = like.shape
        if old is None or start == 0:
            return mx.zeros((B, H, capacity, D), like.dtype)
        return mx.concatenate([old[:, :, :start], mx.zeros((B, H, capacity - start, D), like.dtype)], axis=2)


class DeltaCache:
    """The conv_state and recurrent_state of one DeltaNet layer. Each pass replaces them; none writes in place."""

    def __init__(self, state: DeltaState):
        self.state = state
        self.steps: DeltaState | None = None  # the states after each token of the last pass, if it was stepwise

    def replace(self, state: DeltaState, stepwise: bool) -> None:
        """Store the state after a pass. After a stepwise pass `state` holds one for each token, (B, T, ...)."""
        self.steps = state if stepwise else None
        self.state = DeltaState(*(array[:, -1] for array in state)) if stepwise else state

    def rollback(self, counts: Sequence[int]) -> None:
        """Return row i to the state after counts[i] tokens of the last pass. A row of 0 had no tokens in it."""
        assert self.steps is not None, "the last pass was not stepwise"
        last = [max(0, count - 1) for count in counts]
        if len(set(last)) == 1:
            self.state = DeltaState(*(array[:, last[0]] for array in self.steps))
        else:
            self.state = DeltaState(*(array[mx.arange(len(last)), mx.array(last)] for array in self.steps))
        self.steps = None

    def arrays(self) -> list[mx.array]:
        return list(self.state)


LayerCache = KVCache | DeltaCache
