"""In which order rows are seen: the same for the same seed, on every machine, and after a run was resumed."""

import hashlib
from collections.abc import Sequence

import numpy as np


class Order:
    """The rows of each step of the optimizer.

    An epoch is a permutation of all rows, of its own by seed and epoch. A step takes the next batch_size * accumulate
    of them; the last step of an epoch may have fewer. Within a step rows of similar length come together in a batch, so
    that little is padded. Since each target of a step weighs the same, this changes no gradient but in its rounding.

    len() is the steps of an epoch. [n] is step n, counted from 0 over all epochs: its batches, each of indices of rows.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, accumulate: int, seed: int):
        """lengths: (rows,) tokens of each row."""
        self._lengths, self._batch, self._seed = np.asarray(lengths), batch_size, seed
        self._rows = batch_size * accumulate
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._rows)

    def __getitem__(self, step: int) -> list[list[int]]:
        epoch, place = divmod(step, len(self))
        if epoch != self._epoch:
            # RandomState: numpy promises that its numbers never change (NEP 19), of Generator it does not.
            digest = hashlib.sha256(f"{self._seed} {epoch}".encode()).digest()
            draw = np.random.RandomState(np.frombuffer(digest, "<u4"))
            self._epoch, self._permutation = epoch, draw.permutation(len(self._lengths))
        rows = self._permutation[place * self._rows : (place + 1) * self._rows]
        rows = rows[np.argsort(self._lengths[rows], kind="stable")]
        return [rows[i : i + self._batch].tolist() for i in range(0, len(rows), self._batch)]
