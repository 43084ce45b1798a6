"""Low-rank parts beside a product: y = W x + B (A x) (LoRA, arXiv:2106.09685), of one adapter or of one for each row.

Letters: N adapters, R the sum of the ranks of a product's maps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.backend import backend

Maps = tuple[tuple[str, int], ...]  # the weights whose rows stand in one product: Hugging Face's name, and its rows


class LowRank(NamedTuple):
    """The low-rank parts beside one product, of the N adapters that have one there. Smaller ranks end in zeros."""

    a: mx.array  # (N, R, in)
    b: mx.array  # (N, out, R), the scale inside
    owners: tuple[int, ...] = (0,)  # the index of each of the N adapters among all that are loaded

    def of(self, adapter: int) -> tuple[mx.array, mx.array] | None:
        """A (R, in) and B (out, R) of an adapter; None where it has no part here."""
        if adapter not in self.owners:
            return None
        at = self.owners.index(adapter)
        return self.a[at : at + 1].squeeze(0), self.b[at : at + 1].squeeze(0)  # views; an index alone would copy


class Places(NamedTuple):
    """Where the adapters of B rows stand among the N of a product."""

    a: mx.array  # (B,) 0 to B - 1: the rows, for gather_mm, which would compute them each time
    b: mx.array  # (B,) 0 to N - 1, any for a row without one
    there: mx.array | None  # (B, 1, 1) boolean: whether a row has one; None: all have


Lookup = Callable[[Maps], LowRank | None]  # the low-rank parts of a product; None: no adapter has one


class ActiveAdapters:
    """The adapters of one forward pass.

    rows: the index of the one adapter of all rows, or of each row's, where -1 is none.
    """

    def __init__(self, lookup: Lookup, rows: int | Sequence[int]):
        self.lookup, self.rows = lookup, rows
        self._places: dict[tuple[int, ...], Places | None] = {}

    def add(self, maps: Maps, x: mx.array, y: mx.array) -> mx.array:
        """y (B, ..., out) of a product of x (B, ..., in), with what the adapter of each row adds."""
        low = self.lookup(maps)
        if low is None:
            return y
        if isinstance(self.rows, int):
            own = low.of(self.rows)
            return y if own is None else _plus(y, x.reshape(-1, x.shape[-1]) @ own[0].T, own[1].T)
        places = self._where(low.owners, self.rows)
        if places is None:
            return y
        inner = x.reshape(len(x), -1, x.shape[-1])
        inner = mx.gather_mm(inner, low.a.swapaxes(1, 2), lhs_indices=places.a, rhs_indices=places.b)
        return _plus_each(y, inner, low.b.swapaxes(1, 2), places)

    def add_rows(self, maps: Maps, tokens: mx.array, y: mx.array) -> mx.array:
        """y (B, T, D), rows of a table that tokens (B, T) look up, with what the adapter of each row adds."""
        low = self.lookup(maps)
        if low is None:
            return y
        if isinstance(self.rows, int):
            own = low.of(self.rows)
            return y if own is None else _plus(y, own[1][tokens.flatten()], own[0])
        places = self._where(low.owners, self.rows)
        if places is None:
            return y
        return _plus_each(y, low.b[places.b[:, None], tokens], low.a, places)

    def _where(self, owners: tuple[int, ...], rows: Sequence[int]) -> Places | None:
        """The places of the rows among a product's adapters; None where no row has one there."""
        if owners not in self._places:
            there = [row in owners for row in rows]
            at = mx.array([owners.index(row) if row in owners else 0 for row in rows], mx.uint32)
            some = None if all(there) else mx.array([[[own]] for own in there])
            places = Places(mx.array(list(range(len(rows))), mx.uint32), at, some)
            self._places[owners] = places if any(there) else None
        return self._places[owners]


def _plus(y: mx.array, inner: mx.array, matrix: mx.array) -> mx.array:
    """y (..., out) + inner (n, R) @ matrix (R, out), n the rows of y. A GPU adds in the launch of the product."""
    flat = y.reshape(-1, y.shape[-1])
    # On the CPU apart, as in a batch of several adapters: each row gets the same numbers as alone.
    flat = mx.addmm(flat, inner, matrix) if backend().joins_projections else flat + inner @ matrix
    return flat.reshape(y.shape).astype(y.dtype)


def _plus_each(y: mx.array, inner: mx.array, matrices: mx.array, places: Places) -> mx.array:
    """y (B, ..., out) + inner (B, T, R) @ each row's of matrices (N, R, out)."""
    if places.there is not None:
        inner = mx.where(places.there, inner, 0)  # whatever another adapter makes of such a row, infinity too
    added = mx.gather_mm(inner, matrices, lhs_indices=places.a, rhs_indices=places.b)
    return y + added.reshape(y.shape).astype(y.dtype)
