"""The ranks over mx.distributed: over TCP (`ring`), or over Thunderbolt 5 (`jaccl`).

Both compute on MLX's CPU stream, wherever their arrays come from; MLX waits for a GPU by itself. Sums of 16-bit types
work, and have the same bits on every rank over the ring.
"""

import mlx.core as mx

_BACKENDS = ("[ring]", "[jaccl]")  # how their errors begin


class RingGroup:
    """A Group over a group of mx.distributed."""

    def __init__(self, group: mx.distributed.Group):
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def all_sum(self, array: mx.array) -> mx.array:
        """The sum of every rank's array, the same bits on every rank; lazy, of the same dtype."""
        return mx.distributed.all_sum(array, group=self._group)

    def all_gather(self, array: mx.array) -> mx.array:
        """(n, ...) of each rank -> (size, n, ...) of all, in the order of ranks; lazy."""
        return mx.distributed.all_gather(array[None], group=self._group)

    def send(self, array: mx.array, to: int) -> mx.array:
        """Send an array to a neighbour in the ring. What it returns must be evaluated."""
        return mx.distributed.send(array, to, group=self._group)

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        """The array that a neighbour sends; lazy."""
        return mx.distributed.recv(shape, dtype, source, group=self._group)


def is_collective(error: BaseException | None) -> bool:
    """Whether a collective of MLX raised this, or what this came of."""
    while error is not None:
        if isinstance(error, RuntimeError) and str(error).startswith(_BACKENDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def open_group() -> RingGroup:
    """The ranks that mlx.launch has started with this one."""
    return RingGroup(mx.distributed.init(strict=True, backend="ring"))
