"""What rank 0 tells the other ranks to do, and how the ranks stay together.

A pass, embeddings and logits are orders that every rank obeys at once, since they compute together. What happens to
caches is noted, and goes with the next order: the other ranks do it before they obey.
"""

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.distributed.channel import Leader, Order
from mlx_qwen35.distributed.deferred import signals_deferred
from mlx_qwen35.kernels.low_rank import ActiveAdapters
from mlx_qwen35.machine.process import LOCK
from mlx_qwen35.model.lora import NONE, AdapterSet

MOST_NOTED = 256  # notes that wait for an order, so that caches which no pass follows take no memory for long
IDLE = 1.0  # seconds without an order after which what was noted is given by itself

Fail = Callable[[BaseException], object]  # tells of rank 0's error, and ends every rank and this process


class Orders:
    """Gives the orders of rank 0, one after the other, whatever thread gives them."""

    def __init__(self, leader: Leader, fail: Fail):
        self._leader, self._fail = leader, fail
        self._numbers = itertools.count()
        self._noted: deque[list[Any]] = deque()
        self._given = 0
        threading.Thread(target=_keep_up, args=(weakref.ref(self),), name="orders", daemon=True).start()

    @contextmanager
    def together(self) -> Iterator[None]:
        """The block is done whole: no signal ends it half way, and no other thread gives an order meanwhile.

        An exception before an order of the block is raised. One behind it ends every rank: the others have obeyed, or
        wait for this one.
        """
        with LOCK, signals_deferred():
            before = self._given
            try:
                yield
            except BaseException as error:
                if self._given != before:
                    self._fail(error)
                raise

    def give(self, name: str, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Give an order, with what was noted. In a block of `together`."""
        self._given += 1
        noted = [self._noted.popleft() for _ in range(len(self._noted))]
        self._leader.give(Order(name, {"noted": noted, **fields}, arrays))

    def ask(self, name: str, **fields: Any) -> Sequence[Mapping[str, Any]]:
        """Give an order that the other ranks answer; their answers. In a block of `together`."""
        self.give(name, fields, {})
        return self._leader.answers()

    def note(self, name: str, *values: Any) -> None:
        """What the other ranks are to do with their caches before the next order. In a block of `together`."""
        self._noted.append([name, *values])
        if len(self._noted) >= MOST_NOTED:
            self.give("keep", {}, {})

    def keep_up(self, given: int) -> int:
        """Give what was noted where no order has followed since so many were given; how many are given now."""
        if self._noted and self._given == given:
            with self.together():
                self.give("keep", {}, {})
        return self._given

    def number(self, cache: Cache) -> int:
        """The number of a new cache. Once nobody holds the cache, the other ranks drop theirs."""
        number = next(self._numbers)
        # It may run in any thread, in the middle of anything: it does nothing but append.
        weakref.finalize(cache, self._noted.append, ["drop", number]).atexit = False
        return number


def _keep_up(orders: "weakref.ref[Orders]") -> None:
    """So that other ranks hold no memory for caches that rank 0 let go of while no order comes."""
    given = 0
    while found := orders():
        try:
            given = found.keep_up(given)
        except OSError:  # the ranks have parted
            return
        del found
        time.sleep(IDLE)


# --- values of orders -------------------------------------------------------------------------------------------------


def sent(array: mx.array) -> np.ndarray:
    """An array as an order takes it, the bits of 16-bit numbers as integers. Waits for it."""
    return np.array(array.view(mx.uint16) if array.dtype in (mx.float16, mx.bfloat16) else array)


def received(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The activations that `sent` made an array of, which were of this dtype or of float32."""
    return mx.array(array).view(dtype) if array.dtype == np.uint16 else mx.array(array)


def rows_of(adapters: ActiveAdapters | None) -> int | list[int] | None:
    """The adapters of a pass as an order takes them."""
    rows = adapters.rows if adapters else None
    return rows if rows is None or isinstance(rows, int) else list(rows)


def adapters_of(rows: int | list[int] | None, loaded: AdapterSet) -> ActiveAdapters | None:
    """The adapters of a pass, which `rows_of` took apart on a rank that loaded the same."""
    if rows is None:
        return None
    each = [rows] if isinstance(rows, int) else rows
    return loaded.active([NONE if row < 0 else loaded.names[row] for row in each])
