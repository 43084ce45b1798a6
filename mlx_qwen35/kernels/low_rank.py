"""Low-rank parts beside a product: y = W x + B (A x) (LoRA, arXiv:2106.09685), of one adapter or of one for each row.

Letters: N adapters, R the sum of the ranks of a product's maps.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

Maps = tuple[tuple[str, int], ...]  # the weights whose rows stand in one product: Hugging Face's name, and its rows


class LowRank(NamedTuple):
    """The low-rank parts beside one product, of several adapters. An adapter without a part there has zeros."""

    a: mx.array  # (N, R, in)
    b: mx.array  # (N, out, R), the scale inside


Lookup = Callable[[Maps], LowRank | None]  # the low-rank parts of a product; None: no adapter has one


class ActiveAdapters:
    """The adapters of one forward pass.

    rows: the index of the one adapter of all rows, or (B,) integers, one for each row.
    """

    def __init__(self, lookup: Lookup, rows: int | mx.array):
        self.lookup, self.rows = lookup, rows

    def add(self, maps: Maps, x: mx.array, y: mx.array) -> mx.array:
        """y (B, ..., out) of a product of x (B, ..., in), with what the adapter of each row adds."""
        low = self.lookup(maps)
        if low is None:
            return y
        if isinstance(self.rows, int):
            return y + ((x @ low.a[self.rows].T) @ low.b[self.rows].T).astype(y.dtype)
        inner = x.reshape(len(x), -1, x.shape[-1])
        inner = mx.gather_mm(inner, low.a.swapaxes(1, 2), rhs_indices=self.rows)
        added = mx.gather_mm(inner, low.b.swapaxes(1, 2), rhs_indices=self.rows)
        return y + added.reshape(y.shape).astype(y.dtype)

    def add_rows(self, maps: Maps, tokens: mx.array, y: mx.array) -> mx.array:
        """y (B, T, D), rows of a table that tokens (B, T) look up, with what the adapter of each row adds."""
        low = self.lookup(maps)
        if low is None:
            return y
        if isinstance(self.rows, int):
            return y + (low.b[self.rows][tokens] @ low.a[self.rows]).astype(y.dtype)
        inner = low.b[self.rows[:, None], tokens]
        return y + mx.gather_mm(inner, low.a, rhs_indices=self.rows).astype(y.dtype)
