"""How arrays lie in memory: strides, and what MLX can look at in another shape without a copy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Where an array's elements lie. The stride of a dim of one element means nothing, yet MLX keeps it and asks it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    buffer: int  # elements of the buffer that it lies in

    @property
    def in_order(self) -> bool:
        """Row contiguous."""
        return self._steps_like(row_strides(self.shape))

    @property
    def in_reverse(self) -> bool:
        """Column contiguous."""
        return self._steps_like(row_strides(self.shape[::-1])[::-1])

    def _steps_like(self, strides: Sequence[int]) -> bool:
        return all(n == 1 or s == e for n, s, e in zip(self.shape, self.strides, strides, strict=True))

    @property
    def dense(self) -> bool:
        """Without gaps, in whatever order; the same element may stand for many."""
        size = 1
        for stride, length in sorted((s, n) for n, s in zip(self.shape, self.strides, strict=True) if n > 1 and s):
            if stride != size:
                return False
            size *= length
        return True

    @property
    def elements(self) -> int:
        """How many it shows, each once: a broadcast axis adds none, a part of an array holds only its own."""
        return math.prod(n if s else 1 for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def scalar(self) -> bool:
        """One element in memory."""
        return not any(n > 1 and s for n, s in zip(self.shape, self.strides, strict=True))


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def fresh(shape: Sequence[int]) -> Layout:
    """In order, in a buffer of its own."""
    return Layout(tuple(shape), row_strides(shape), math.prod(shape))


def reshaped(source: Layout, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of the same memory in another shape; None where that takes a copy (MLX, prepare_reshape)."""
    if source.in_order:
        return row_strides(shape)
    lengths, steps = _merged(source)
    strides: list[int] = []
    j = 0
    for n in shape:
        if j < len(lengths) and lengths[j] % n == 0:
            lengths[j] //= n
            strides.append(lengths[j] * steps[j])
            j += lengths[j] == 1
        elif n == 1:
            strides.append(strides[-1])
        else:
            return None
    return tuple(strides)


def _merged(source: Layout) -> tuple[list[int], list[int]]:
    """Lengths and strides with neighbouring dims made one where a single stride walks through both."""
    lengths: list[int] = []
    steps: list[int] = []
    for n, stride in zip(source.shape, source.strides, strict=True):
        if n == 1:
            continue
        if lengths and steps[-1] == n * stride:
            lengths[-1], steps[-1] = lengths[-1] * n, stride
        else:
            lengths.append(n)
            steps.append(stride)
    return lengths or [1], steps or [1]
