"""Seconds of a token of a split model, computed from the link between the machines and the rate at which each reads
its weights.

Decoding is bound by memory, so a machine takes bytes / rate for its part. In a tensor split all compute at once, and
add up twice a layer. In a pipeline one computes after the other, and a row goes from each to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_qwen35.budget.plan import plan_memory
from mlx_qwen35.budget.roofline import DECODE, token_bytes
from mlx_qwen35.budget.splitting import TENSOR, Split
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.machine.chip import Chip

SUMS = 2  # of a layer in a tensor split: behind its mixer and behind its MLP
HANDOVER = 1e-4  # seconds until a GPU has handed an array to the link and goes on: chosen to fit the one published run
ENDS = 2  # collectives of a token beside: the embedding's sum, and the gathering of logits


@dataclass(frozen=True)
class Link:
    """What was measured between machines.

    round_trip: seconds of an order and its answer. all_sum: seconds of one sum of a row of hidden states. bandwidth:
    bytes a second of a long array, one way.
    """

    round_trip: float
    all_sum: float
    bandwidth: float


def part_bytes(checkpoint: Checkpoint, split: Split, context: int) -> list[int]:
    """Bytes that decoding a token moves on each machine at this context, without drafts."""
    parts = [share.of(checkpoint) for share in split.shares(checkpoint.config.text)]
    machines = [plan.machine for plan in split.plans]
    return [
        token_bytes(part, plan_memory(part, machine, context)) for part, machine in zip(parts, machines, strict=True)
    ]


def rate_of(chip: Chip) -> float:
    """Bytes a second at which a chip reads weights as it decodes, as `doctor --plan` reckons."""
    return DECODE[chip.tier] * chip.bandwidth


def collectives(config: TextConfig) -> int:
    """Of a token in a tensor split."""
    return SUMS * config.num_hidden_layers + ENDS


def one_seconds(nbytes: float, rate: float) -> float:
    """Seconds of a token on one machine. nbytes: that a token moves. rate: bytes a second."""
    return nbytes / rate


def tensor_seconds(nbytes: Sequence[float], rates: Sequence[float], sums: int, all_sum: float) -> float:
    """The slowest part, and the sums. nbytes, rates: of each machine. all_sum: seconds of one."""
    return max(map(one_seconds, nbytes, rates)) + sums * all_sum


def pipeline_seconds(nbytes: Sequence[float], rates: Sequence[float], hop: float) -> float:
    """All parts, and of several a hop behind each: the last one leads back to the first. hop: seconds."""
    return sum(map(one_seconds, nbytes, rates)) + (len(nbytes) * hop if len(nbytes) > 1 else 0)


def split_seconds(
    split: Split, parts: Sequence[float], rates: Sequence[float], link: Link, config: TextConfig
) -> float:
    """Seconds of a token. parts: bytes that a token moves on each machine. config: of the whole model."""
    wait = 0.0 if all(plan.machine.on_cpu for plan in split.plans) else HANDOVER
    if split.kind == TENSOR:
        return tensor_seconds(parts, rates, collectives(config), link.all_sum + wait) + link.round_trip / 2  # an order
    row = 2 * config.hidden_size * split.plans[0].machine.dtype.size  # the residual stream, and what is to be added
    return pipeline_seconds(parts, rates, link.round_trip / 2 + row / link.bandwidth + wait)
