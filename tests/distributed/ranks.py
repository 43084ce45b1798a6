"""The ranks of one model as threads of this process, with a group and a channel of queues."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.kv_format import UNQUANTIZED, KVFormat
from mlx_qwen35.checkpoint.adapter_choice import choose
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.share import Share
from mlx_qwen35.distributed.channel import Order
from mlx_qwen35.distributed.follower import ObeyingRank
from mlx_qwen35.distributed.model import Holding, PipelineModel, TensorModel
from mlx_qwen35.distributed.orders import Orders, received, sent
from mlx_qwen35.distributed.pipeline import PipelineSplit
from mlx_qwen35.distributed.tensor import TensorSplit
from mlx_qwen35.load import load_model
from mlx_qwen35.machine.memory import usable_bytes
from mlx_qwen35.model.model import Model

SECONDS = 60  # that a rank waits for another before the test fails


class Ended(BaseException):
    """Every rank ends."""


@dataclass
class Between:
    """What the ranks share: places for their arrays, the streams of a pipeline, orders and answers.

    met: called on rank 0 at each collective. given, sizes: the orders of rank 0, and their bytes. sent_bytes: of a
    pipeline's streams.
    """

    size: int
    tensor: bool
    met: Callable[[], None] = lambda: None
    given: list[Order] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    sent_bytes: int = 0
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=SECONDS)
        self.places: list[np.ndarray | None] = [None] * self.size
        self.orders: list[Queue[Order | None]] = [Queue() for _ in range(self.size)]
        self.answered: list[Queue[Mapping[str, Any]]] = [Queue() for _ in range(self.size)]
        self.streams: list[Queue[np.ndarray]] = [Queue() for _ in range(self.size)]  # to each rank

    def fail(self, error: BaseException) -> NoReturn:
        self.reasons.append(reason := repr(error))
        self.barrier.abort()
        for orders in self.orders:
            orders.put(None)
        raise Ended(reason)


@dataclass
class ThreadGroup:
    between: Between
    rank: int
    size: int

    def _met(self, array: mx.array) -> list[mx.array]:
        if self.rank == 0:
            self.between.met()
        self.between.places[self.rank] = sent(array)
        self.between.barrier.wait()
        found = [received(own, array.dtype) for own in self.between.places if own is not None]
        self.between.barrier.wait()
        return found

    def all_sum(self, array: mx.array) -> mx.array:
        first, *others = self._met(array)
        return sum(others, first)

    def all_gather(self, array: mx.array) -> mx.array:
        return mx.stack(self._met(array))

    def send(self, array: mx.array, to: int) -> mx.array:
        if self.rank == 0:
            self.between.met()
        bits = sent(array)
        self.between.sent_bytes += bits.nbytes
        self.between.streams[to].put(bits)
        return array

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        found = received(self.between.streams[self.rank].get(timeout=SECONDS), dtype)
        assert (found.shape, found.dtype) == (shape, dtype)
        return found


@dataclass
class QueueLeader:
    between: Between

    def give(self, order: Order) -> None:
        words = json.dumps(order.fields)  # as over a wire
        fields = json.loads(words)
        arrays = {name: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for name, a in order.arrays.items()}
        self.between.given.append(order)
        self.between.sizes.append(len(words) + sum(array.nbytes for array in arrays.values()))
        for orders in self.between.orders[1:]:
            orders.put(Order(order.name, fields, arrays))

    def answers(self) -> Sequence[Mapping[str, Any]]:
        return [answered.get(timeout=SECONDS) for answered in self.between.answered[1:]]


@dataclass
class QueueFollower:
    between: Between
    rank: int

    def take(self) -> Order | None:
        return self.between.orders[self.rank].get()

    def answer(self, fields: Mapping[str, Any]) -> None:
        self.between.answered[self.rank].put(json.loads(json.dumps(fields)))


@dataclass
class Ranks:
    """Rank 0's model, and the other ranks."""

    model: Model
    others: list[ObeyingRank]
    between: Between

    def counted(self) -> list[int]:
        """How many caches each other rank has, once it has done all that was noted."""
        orders = self.model.orders
        with orders.together():
            orders.give("keep", {}, {})
        self.wait()
        return [len(rank.caches) for rank in self.others]

    def wait(self) -> None:
        """Until every other rank has obeyed all orders."""
        orders = self.model.orders
        with orders.together():
            orders.ask("first_not_finite", cache=self._kept.number, row=0)

    def __post_init__(self) -> None:
        self._kept = self.model.make_cache()  # of which `wait` asks


def obey(between: Between, rank: int, other: ObeyingRank) -> None:
    """What a rank that is not 0 does."""
    follower = QueueFollower(between, rank)
    try:
        while order := follower.take():
            if (answer := other.obey(order)) is not None:
                follower.answer(answer)
    except BaseException as error:
        with suppress(Ended):
            between.fail(error)


@contextmanager
def ranks(
    folder: Path, split: Sequence[range] | int, *, dtype: mx.Dtype = mx.float32, kv: KVFormat = UNQUANTIZED,
    adapter: Any = None, rope_scaling: str | None = None,
) -> Iterator[Ranks]:  # fmt: skip
    """The ranks of a checkpoint. split: the layers of each rank in a pipeline, or the ranks of a tensor split."""
    checkpoint = open_checkpoint(folder, rope_scaling=rope_scaling)
    text, tensor = checkpoint.config.text, isinstance(split, int)
    if isinstance(split, int):
        shares = [Share.tensor(text, rank, split) for rank in range(split)]
    else:
        shares = [Share.pipeline(text, layers) for layers in split]
    size = len(shares)
    between = Between(size, tensor)
    groups = [ThreadGroup(between, rank, size) for rank in range(size)]

    def loaded(share: Share, make: Any = Model) -> Model:
        chosen = choose(adapter, 1.0, checkpoint)
        return load_model(checkpoint, dtype, "test", kv=kv, adapters=chosen, share=share, make=make)

    orders = Orders(QueueLeader(between), between.fail)
    holdings = [Holding(share.of_config(text), usable_bytes(None)) for share in shares[1:]]
    make = partial(TensorModel if tensor else PipelineModel, text, groups[0], orders, holdings)
    others: list[ObeyingRank] = []
    found = Ranks(loaded(shares[0], make), others, between)
    for share, group in zip(shares[1:], groups[1:], strict=True):
        model = loaded(share)
        own = TensorSplit(model, group, text.vocab_size) if tensor else PipelineSplit(model, group)
        others.append(ObeyingRank(model, own, share.layers.start))

    threads = [threading.Thread(target=obey, args=(between, *own), daemon=True) for own in enumerate(others, 1)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        for queue in between.orders:
            queue.put(None)
        for thread in threads:
            thread.join(SECONDS)
        assert not any(thread.is_alive() for thread in threads), "a rank has not ended"
