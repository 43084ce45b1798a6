"""A part of a model that is loaded at its first use: the vision encoder, the draft head."""

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn

Part = TypeVar("Part", bound=nn.Module)


class LazyPart(Generic[Part]):
    """A part that may be in memory. Whoever uses it says so, and it is not unloaded before all have released it.

    Args:
        load: reads it from disk. Must not hold the model, which would then hold itself.
        nbytes: that it takes in memory, once loaded.
        fault: why it cannot be used, as far as the checkpoint's headers tell.
        keep: whether `unload` leaves it in memory.
        fingerprint: tells its weights from others, see checkpoint/fingerprint.py; "" where nothing is kept of them.
    """

    def __init__(
        self,
        load: Callable[[], Part],
        nbytes: int = 0,
        fault: str | None = None,
        keep: bool = False,
        fingerprint: Callable[[], str] = lambda: "",
    ):
        self._load, self.nbytes, self.fault, self.keep, self.fingerprint = load, nbytes, fault, keep, fingerprint
        self._part: Part | None = None
        self.users: WeakSet[object] = WeakSet()

    @property
    def loaded(self) -> bool:
        return self._part is not None

    @property
    def part(self) -> Part:
        """The part, loaded now if it was not."""
        self._part = self._part or self._load()
        return self._part

    def acquire(self, user: object) -> None:
        """Keep it in memory, once `part` has loaded it, until this user releases it or is gone."""
        self.users.add(user)

    def release(self, user: object) -> None:
        """This user needs it no more."""
        self.users.discard(user)

    def unload(self) -> None:
        """Free its memory, unless it is in use or to be kept. The next use loads it again."""
        if self.loaded and not self.users and not self.keep:
            self._part = None
            mx.clear_cache()
