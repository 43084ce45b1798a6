"""The ways to run a model on machines that were surveyed: on rank 0's alone, or split. Which is advised, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    computed.
    """

    name: str
    split: Split | None
    seconds: float
    fault: str = ""


def chip_of(facts: Facts) -> Chip | None:
    """The Apple chip of a machine whose figures are known."""
    return parse_chip(facts.chip) if facts.apple else None


def machines_of(
    facts: Sequence[Facts], hosts: Sequence[str], dtype: mx.Dtype, kv: KVFormat, limit: int
) -> list[Machine]:
    """What is planned for. Ranks on one machine share what a model may take there. limit: bytes of rank 0's machine.

    hosts: of every rank, the same name for ranks on one machine.
    """
    found = []
    for rank, (own, host) in enumerate(zip(facts, hosts, strict=True)):
        chip = chip_of(own)
        most = (limit if host == hosts[0] else own.limit) // hosts.count(host)
        name = host if hosts.count(host) == 1 else f"{host}, rank {rank}"
        buffers = command_buffers(chip) if chip else None
        found.append(Machine(name, most, dtype, own.attention_impl, chip, buffers, kv))
    return found


def ways(
    checkpoint: Checkpoint, machines: Sequence[Machine], surveyed: Surveyed, name: str, whole: int,
    adapters: Sequence[Adapter] = (),
) -> list[Way]:  # fmt: skip
    """Rank 0's machine alone, a pipeline, and a tensor split. whole: bytes that a model may take on rank 0's machine
    where it is alone.
    """
    alone = [replace(machines[0], limit=whole)]
    tried = ((ONE, PIPELINE, alone), (PIPELINE, PIPELINE, machines), (TENSOR, TENSOR, machines))
    found = []
    for way, kind, own in tried:
        try:
            split = split_model(kind, checkpoint, own, name, adapters=adapters)
        except InputError as error:
            found.append(Way(way, None, 0.0, error.fault))
            continue
        rates = [_rate(machine.chip, facts) for machine, facts in zip(own, surveyed.facts, strict=False)]
        parts = part_bytes(checkpoint, split, min(CONTEXT, split.context))
        found.append(Way(way, split, split_seconds(split, parts, rates, surveyed.link, checkpoint.config.text)))
    return found


def _rate(chip: Chip | None, facts: Facts) -> float:
    """Bytes of weights a second: of a known chip by its figures, else as measured."""
    if chip:
        return rate_of(chip)
    assert facts.rate
    return facts.rate


def advised(found: Sequence[Way], backend: str) -> Way | None:
    """One machine where it is enough; else the faster split, and of equal ones what `auto` means; None: none fits."""
    one, *splits = found
    fitting = [way for way in splits if way.split]
    best = min(fitting, key=lambda way: (way.seconds, way.name != split_of(backend)), default=None)
    if one.split and (best is None or best.seconds > WORTH * one.seconds):
        return one
    return best


def reason(way: Way, found: Sequence[Way]) -> str:
    """Why it is advised."""
    one, *splits = found
    ms = f"{milliseconds(way.seconds)} a token"
    if way.name == ONE:
        longer = max((other.split.context for other in splits if other.split), default=0)
        assert one.split
        more = f" The machines together have room for {longer:,} tokens." if longer > one.split.context else ""
        return f"One machine is enough: {ms}, up to {one.split.context:,} tokens; no split is faster.{more}"
    other = next(other for other in splits if other.name != way.name)
    beside = f"; {other.name} would take {milliseconds(other.seconds)}" if other.split else ""
    if one.split:
        return f"A {way.name} split is worth it: {ms} in place of {milliseconds(one.seconds)} on one machine{beside}."
    assert way.split
    return f"The model needs the machines together: {ms}, up to {way.split.context:,} tokens{beside}."


def milliseconds(seconds: float) -> str:
    """1,057 ms, 57 ms, 4.1 ms, of less than 1 ms 0.12 ms."""
    value = 1000 * seconds
    return f"{value:,.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f} ms"
