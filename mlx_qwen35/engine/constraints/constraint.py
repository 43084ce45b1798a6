"""What tokens a sequence may go on with: the one door for grammars, thinking budgets and callers' own rules."""

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """What tokens a sequence may go on with. It holds its place in the sequence."""

    def mask(self) -> np.ndarray | None:
        """The tokens that may come next, end tokens included; None: any.

        (V,) boolean, True for a token that may come, where V may be the tokenizer's size; or (W,) uint32, 32 tokens a
        word, the lowest bit first. Tokens beyond it are forbidden.
        """

    def accept(self, token: int) -> None:
        """The sequence goes on with this token."""

    def rollback(self, count: int) -> None:
        """Undo the last `count` accepted tokens."""
