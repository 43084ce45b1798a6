"""The orders of rank 0 to the other ranks, beside the collectives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Order:
    """What the other ranks are to do next.

    name: of the order. fields: values that JSON can hold. arrays: numbers that go beside them as raw bytes.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Leader(Protocol):
    """Rank 0's end."""

    def give(self, order: Order) -> None:
        """Send an order to every other rank. It does not wait for them. From any thread, one order after the other."""

    def answers(self) -> Sequence[Mapping[str, Any]]:
        """The next answer of every other rank, in the order of ranks. Waits for them."""


class Follower(Protocol):
    """The end of any other rank."""

    def take(self) -> Order | None:
        """The next order; waits for it. None once rank 0 has ended well."""

    def answer(self, fields: Mapping[str, Any]) -> None:
        """Answer rank 0, values that JSON can hold."""
