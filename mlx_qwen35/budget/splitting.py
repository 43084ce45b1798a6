"""What each of several machines holds of a model that is split over them, and how long a context then fits.

A pipeline gives each machine a range of layers. A tensor split gives each a part of every layer. Rank 0 has the draft
head, the vision encoder and the sampling besides; in a pipeline also the table of tokens, the final norm and the head.
"""

import bisect
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from mlx_qwen35.budget.adapters import adapter_bytes
from mlx_qwen35.budget.plan import (
    PIXELS,
    SHORT,
    Machine,
    MemoryPlan,
    growth_bytes,
    in_gb,
    kv_bytes,
    loaded_bytes,
    longest_context,
    most_prefill_bytes,
    names,
    plan_memory,
    state_bytes,
    unpacks,
)  # fmt: skip
from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.config import FULL, LINEAR, TextConfig
from mlx_qwen35.checkpoint.names import MTP, TEXT, VISION
from mlx_qwen35.checkpoint.shapes import text_shapes
from mlx_qwen35.checkpoint.share import Share, check_machines
from mlx_qwen35.errors import InputError

PIPELINE, TENSOR, AUTO = "pipeline", "tensor", "auto"
SPLITS = (TENSOR, PIPELINE, AUTO)
STEP = 1024  # tokens, in which the longest context is counted
CHUNK_OF = 8192  # tokens of the context whose chunks are reckoned with: the shortest that a machine wants, for all


@dataclass(frozen=True)
class Split:
    """A model over several machines, rank 0 first.

    kind: PIPELINE or TENSOR. layers: of each machine. plans: the memory of each at the longest context that fits all.
    """

    kind: str
    layers: tuple[range, ...]
    plans: tuple[MemoryPlan, ...]

    @property
    def context(self) -> int:
        """Tokens."""
        return self.plans[0].context

    def shares(self, config: TextConfig) -> list[Share]:
        """What each machine holds of the model of this configuration."""
        if self.kind == TENSOR:
            return [Share.tensor(config, rank, len(self.plans)) for rank in range(len(self.plans))]
        return Share.pipelines(config, self.layers)


def split_of(backend: str) -> str:
    """What `auto` means: tensor over jaccl, whose sums take microseconds; else a pipeline, which sums nothing."""
    return TENSOR if backend == "jaccl" else PIPELINE


def split_model(
    kind: str, checkpoint: Checkpoint, machines: Sequence[Machine], name: str, *, mtp: int = 0,
    adapters: Sequence[Adapter] = (),
) -> Split:  # fmt: skip
    """The split of this kind with the longest context. It has room for an image where that fits and the model sees.

    machines: rank 0's first; all compute in one dtype and in one form of keys and values. name: of the model, for
    messages. mtp, adapters: as for `plan_memory`.

    Raises InputError memory_exceeded, with what each machine needs and has; split_unfit for more machines than layers,
    and for a number of machines that heads or packed weights do not divide by.
    """
    found = pipeline_split if kind == PIPELINE else tensor_split
    seen = (PIXELS, 0) if checkpoint.has(VISION) else (0,)
    for pixels in seen:
        split = found(checkpoint, machines, pixels=pixels, mtp=mtp, adapters=adapters)
        if all(plan.image <= plan.machine.limit for plan in split.plans):
            return split
    raise _refusal(split, name)


def _refusal(split: Split, name: str) -> InputError:
    each = [
        f"{plan.machine.name} would take {in_gb(plan.image)}"
        + (f" with layers {layers[0]} to {layers[-1]}" if split.kind == PIPELINE else "")
        + f", and a model may take {in_gb(plan.machine.limit)} there"
        for plan, layers in zip(split.plans, split.layers, strict=True)
    ]
    return InputError(
        "memory_exceeded",
        f"{name} does not fit these machines with {SHORT} tokens, split by {split.kind}: {'; '.join(each)}",
        "Choose a folder with fewer bits, a smaller model of the family, or more machines",
    )


# --- pipeline --------------------------------------------------------------------------------------------------------


def pipeline_split(
    checkpoint: Checkpoint, machines: Sequence[Machine], *, pixels: int = 0, mtp: int = 0,
    adapters: Sequence[Adapter] = (),
) -> Split:  # fmt: skip
    """The layer ranges with the longest context, in steps of 1,024 tokens; of these, the ones where the machine that
    is filled most, in proportion to its limit, is filled least. Each machine has a layer at least.

    Where nothing fits, the split at SHORT tokens whose plans come nearest. For the rest see `split_model`.
    """
    text = checkpoint.config.text
    check_machines(text, len(machines))
    held = _Held(checkpoint, machines, pixels, mtp, adapters)
    contexts = [SHORT, *range(STEP, text.max_position_embeddings + 1, STEP)]

    @functools.cache
    def nearest(context: int) -> Split:
        def fill(rank: int, layers: range) -> float:
            plan = held.plan(rank, layers, context)
            return plan.image / plan.machine.limit

        layers = lowest_maximum(len(machines), text.num_hidden_layers, fill)
        plans = tuple(held.plan(rank, own, context) for rank, own in enumerate(layers))
        return Split(PIPELINE, layers, plans)

    def too_long(context: int) -> bool:
        return any(plan.image > plan.machine.limit for plan in nearest(context).plans)

    return nearest(contexts[max(0, bisect.bisect_left(contexts, True, key=too_long) - 1)])


def lowest_maximum(ranks: int, layers: int, cost: Callable[[int, range], float]) -> tuple[range, ...]:
    """The consecutive ranges, one a rank and none empty, whose highest cost (rank, range) is the lowest."""
    ends: dict[int, tuple[float, tuple[range, ...]]] = {0: (0.0, ())}  # after some ranks, by the layer where they end
    for rank in range(ranks):
        later = ranks - rank - 1
        reached = range(rank + 1, layers - later + 1) if later else [layers]
        ends = {
            end: min(
                ((max(highest, cost(rank, range(start, end))), (*before, range(start, end)))
                 for start, (highest, before) in ends.items() if start < end),
                key=lambda found: found[0],
            )
            for end in reached
        }  # fmt: skip
    return ends[layers][1]


class _Layer(NamedTuple):
    """Sums over the layers before one: bytes, and how many of each kind."""

    weights: int = 0
    adapters: int = 0
    full: int = 0
    linear: int = 0

    def plus(self, other: "_Layer", sign: int = 1) -> "_Layer":
        return _Layer(*(a + sign * b for a, b in zip(self, other, strict=True)))


class _Held:
    """The memory of any range of layers, from sums over layers: the search asks for many."""

    def __init__(
        self, checkpoint: Checkpoint, machines: Sequence[Machine], pixels: int, mtp: int, adapters: Sequence[Adapter]
    ):
        self._checkpoint, self._machines, self._mtp = checkpoint, machines, mtp
        text, dtype, joined = checkpoint.config.text, machines[0].dtype, not machines[0].on_cpu
        self._whole = [
            plan_memory(checkpoint, machine, SHORT, pixels=pixels, mtp=mtp, adapters=adapters) for machine in machines
        ]
        shapes, layers = text_shapes(text), []
        for i, kind in enumerate(text.layer_types):
            prefix = f"{TEXT}layers.{i}."
            own = names(checkpoint, {name: shape for name, shape in shapes.items() if name.startswith(prefix)})
            pairs = [
                replace(one, pairs={name: pair for name, pair in one.pairs.items() if name.startswith(prefix)})
                for one in adapters
            ]
            layers.append(
                _Layer(
                    loaded_bytes(checkpoint, own, dtype), adapter_bytes(checkpoint, pairs, dtype, joined),
                    kind == FULL, kind == LINEAR,
                )
            )  # fmt: skip
        self._norm = loaded_bytes(checkpoint, [f"{TEXT}norm.weight"], dtype)
        self._before = list(accumulate(layers, _Layer.plus, initial=_Layer()))
        self._kinds = {kind: replace(text, layer_types=(kind,)) for kind in (FULL, LINEAR)}
        self._chunk = _chunk(checkpoint, machines)
        self._unpacks = unpacks(checkpoint)
        self._prefill = functools.cache(self._prefill_bytes)

    def plan(self, rank: int, layers: range, context: int) -> MemoryPlan:
        """What `plan_memory` says of a checkpoint of these layers, with all else on rank 0."""
        whole, machine = self._whole[rank], self._machines[rank]
        held = self._before[layers.stop].plus(self._before[layers.start], -1)
        weights, adapters = held.weights + self._norm, held.adapters
        if rank == 0:  # all but the other layers
            others = self._before[-1].plus(held, -1)
            weights, adapters = whole.weights - others.weights, whole.adapters - others.adapters
        size, text = machine.dtype.size, self._checkpoint.config.text
        drafting = text.mtp_num_hidden_layers if self._mtp and rank == 0 else 0
        full = self._kinds[FULL]
        return MemoryPlan(
            machine, context, self._chunk,
            weights=weights, adapters=adapters, drafts=whole.drafts * (rank == 0),
            kv=(held.full + drafting) * kv_bytes(full, context, size, kv=machine.kv),
            state=2 * (1 + self._mtp) * held.linear * state_bytes(self._kinds[LINEAR], size),
            prefill=self._prefill(machine, bool(held.full), bool(held.linear), context),
            sampling=whole.sampling * (rank == 0),
            growth=growth_bytes(full, context, size, machine.kv) * bool(held.full),
            buffers=whole.buffers,
            vision_encoder=whole.vision_encoder * (rank == 0), encoding=whole.encoding * (rank == 0),
        )  # fmt: skip

    def _prefill_bytes(self, machine: Machine, full: bool, linear: bool, context: int) -> int:
        kinds = (FULL,) * full + (LINEAR,) * linear
        text = replace(self._checkpoint.config.text, layer_types=kinds)
        return most_prefill_bytes(text, machine, context, self._chunk, self._unpacks and machine.on_cpu)


# --- tensor ----------------------------------------------------------------------------------------------------------


def tensor_split(
    checkpoint: Checkpoint, machines: Sequence[Machine], *, pixels: int = 0, mtp: int = 0,
    adapters: Sequence[Adapter] = (),
) -> Split:  # fmt: skip
    """Equal parts of every layer, with the longest context that fits each machine, in steps of 1,024 tokens.

    Where a part does not fit, the split at SHORT tokens. For the rest see `split_model`. Raises InputError split_unfit
    where the heads, or the groups of packed weights, do not divide by the number of machines.
    """
    text, count = checkpoint.config.text, len(machines)
    shares = [Share.tensor(text, rank, count) for rank in range(count)]
    parts = [_without_ends(share.of(checkpoint)) if rank else share.of(checkpoint) for rank, share in enumerate(shares)]
    own = [[share.of_adapter(adapter, checkpoint) for adapter in adapters] for share in shares]
    held, chunk = [share.planned(text) for share in shares], _chunk(checkpoint, machines)

    def planned(rank: int, context: int) -> MemoryPlan:
        return plan_memory(
            parts[rank], machines[rank], context, pixels=pixels * (rank == 0), chunk=chunk, mtp=mtp,
            adapters=own[rank], held=held[rank],
        )  # fmt: skip

    most = min(
        longest_context(parts[rank], planned(rank, STEP), machine.kv, mtp, held[rank])
        for rank, machine in enumerate(machines)
    )
    layers = (range(text.num_hidden_layers),) * count
    return Split(TENSOR, layers, tuple(planned(rank, most or SHORT) for rank in range(count)))


def _without_ends(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint without vision encoder and draft head, which are rank 0's."""
    entries = {name: entry for name, entry in checkpoint.entries.items() if not name.startswith((VISION, MTP))}
    return replace(checkpoint, entries=entries)


# --- both ------------------------------------------------------------------------------------------------------------


def _chunk(checkpoint: Checkpoint, machines: Sequence[Machine]) -> int:
    """Tokens of a chunk that suits every machine."""
    context = min(CHUNK_OF, checkpoint.config.text.max_position_embeddings)
    return min(plan_memory(checkpoint, machine, context).chunk for machine in machines)
