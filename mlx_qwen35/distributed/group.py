"""What ranks compute together: few collectives, in one place, in the same order on every rank."""

from typing import Protocol

import mlx.core as mx


class Group(Protocol):
    """The ranks of one model."""

    rank: int
    size: int

    def all_sum(self, array: mx.array) -> mx.array:
        """The sum of every rank's array, the same bits on every rank; lazy, of the same dtype."""

    def all_gather(self, array: mx.array) -> mx.array:
        """(n, ...) of each rank -> (size, n, ...) of all, in the order of ranks; lazy."""

    def send(self, array: mx.array, to: int) -> mx.array:
        """Send an array to a neighbour in the ring. What it returns must be evaluated."""

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        """The array that a neighbour sends; lazy."""
