"""The ways to run a model on machines that were surveyed: on rank 0's alone, or split. Which is advised, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen35.budget.plan import Machine
from mlx_qwen35.budget.split_speed import part_bytes, rate_of, split_seconds
from mlx_qwen35.budget.splitting import PIPELINE, TENSOR, Split, split_model, split_of
from mlx_qwen35.cache.kv_format import KVFormat
from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.distributed.survey import Facts, Surveyed
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.chip import Chip, command_buffers, parse_chip

ONE = "one machine"
CONTEXT = 8192  # tokens that a token's seconds are computed for
WORTH = 0.9  # of the seconds on one machine, from which on a split is advised for its speed


@dataclass(frozen=True)
class Way:
    """name: ONE, PIPELINE or TENSOR. split: None where it is not possible, for the reason `fault`. seconds: of a token,
    computed. late: the same where the link takes what it takes at the 95th percentile; None: there is no link.
    """

    name: str
    split: Split | None
    seconds: float
    fault: str = ""
    late: float | None = None

    def is_faster_than(self, other: "Way") -> bool:
        """Whether it is worth another choice: faster by a tenth, the noise of the link aside."""
        return (self.late or self.seconds) <= WORTH * other.seconds


def chip_of(facts: Facts) -> Chip | None:
    """The Apple chip of a machine whose figures are known."""
    return parse_chip(facts.chip) if facts.apple else None


@dataclass(frozen=True)
class Found:
    """What the ways follow from. hosts: of every rank, the same name for ranks on one machine. limit: bytes that a
    model may take on rank 0's machine. name: of the model, for messages.
    """

    checkpoint: Checkpoint
    surveyed: Surveyed
    hosts: Sequence[str]
    dtype: mx.Dtype
    kv: KVFormat
    limit: int
    name: str
    adapters: Sequence[Adapter] = ()

    def machine(self, rank: int, alone: bool) -> Machine:
        """What is planned for. Ranks on one machine share what a model may take there, unless it is `alone` there."""
        facts, host = self.surveyed.facts[rank], self.hosts[rank]
        chip, count = chip_of(facts), self.hosts.count(host)
        whole = self.limit if host == self.hosts[0] else facts.limit
        name = host if alone or count == 1 else f"{host}, rank {rank}"
        buffers = command_buffers(chip) if chip else None
        limit = whole if alone else whole // count
        return Machine(name, limit, self.dtype, facts.attention_impl, chip, buffers, self.kv)

    def rate(self, rank: int, together: bool = False) -> float:
        """Bytes of weights a second: of a known chip by its figures, else as measured, at best on the machine.

        together: ranks on one machine share it, as they read at the same time.
        """
        count = self.hosts.count(self.hosts[rank]) if together else 1
        if chip := chip_of(self.surveyed.facts[rank]):
            return rate_of(chip) / count
        each = zip(self.surveyed.facts, self.hosts, strict=True)
        return max(facts.rate for facts, host in each if host == self.hosts[rank] and facts.rate) / count

    def way(self, name: str, ranks: Sequence[int]) -> Way:
        """One of the ways, on these ranks."""
        kind, text = TENSOR if name == TENSOR else PIPELINE, self.checkpoint.config.text
        machines = [self.machine(rank, alone=name == ONE) for rank in ranks]
        try:
            split = split_model(kind, self.checkpoint, machines, self.name, adapters=self.adapters)
        except InputError as error:
            return Way(name, None, 0.0, error.fault)
        parts = part_bytes(self.checkpoint, split, min(CONTEXT, split.context))
        rates = [self.rate(rank, together=name == TENSOR) for rank in ranks]
        links = self.surveyed.link, self.surveyed.late_link
        seconds, late = (split_seconds(split, parts, rates, link, text) for link in links)
        return Way(name, split, seconds, late=None if name == ONE else late)


def ways(found: Found) -> list[Way]:
    """The machine alone on which a token takes the shortest, a pipeline, and a tensor split."""
    every = range(len(found.hosts))
    alone = [found.way(ONE, [rank]) for rank in every if found.hosts.index(found.hosts[rank]) == rank]
    one = min(alone, key=lambda way: (way.split is None, way.seconds))
    return [one, found.way(PIPELINE, every), found.way(TENSOR, every)]


def advised(found: Sequence[Way], backend: str) -> Way | None:
    """One machine where it is enough; else what `auto` means, and where that does not fit the other split; None: none
    fits.
    """
    one, *splits = found
    fitting = [way for way in splits if way.split]
    best = min(fitting, key=lambda way: way.name != split_of(backend), default=None)
    if best is None:
        return one if one.split else None
    return one if is_long_enough(one, best) and not best.is_faster_than(one) else best


def is_long_enough(one: Way, other: Way) -> bool:
    """Whether one machine has room for a context of CONTEXT tokens, or for as many as the other way."""
    return bool(one.split and other.split and one.split.context >= min(CONTEXT, other.split.context))


def reason(way: Way, found: Sequence[Way]) -> str:
    """Why it is advised."""
    one, *splits = found
    assert way.split
    takes = f"{milliseconds(way.seconds)} a token, up to {way.split.context:,} tokens"
    others = [other for other in splits if other.split and other is not way]
    beside = "".join(f" {other.name.capitalize()} would take {milliseconds(other.seconds)}." for other in others)
    if any(other.is_faster_than(way) for other in others):
        beside += " That is computed, and not what --split auto runs over this link: time both."
    if way.name == ONE:
        longer = max((other.split.context for other in others if other.split), default=0)
        more = f" The machines together have room for {longer:,} tokens." if longer > way.split.context else ""
        return f"One machine is enough, {way.split.plans[0].machine.name}: {takes}.{beside}{more}"
    if one.split is None:
        return f"The model needs the machines together: {way.name} takes {takes}.{beside}"
    if not is_long_enough(one, way):
        return f"One machine has room for {one.split.context:,} tokens: {way.name} takes {takes}.{beside}"
    return f"A {way.name} split is worth it: {takes}, in place of {milliseconds(one.seconds)} on one machine.{beside}"


def milliseconds(seconds: float) -> str:
    """1,057 ms, 57 ms, 4.1 ms, of less than 1 ms 0.12 ms."""
    value = 1000 * seconds
    return f"{value:,.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f} ms"
