"""mlx_qwen35.doctor --plan: what a model would take and how fast it would be, here and on Macs, without loading it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.budget.plan import PIXELS, Machine, MemoryPlan, longest_context, mac, plan_memory, this_machine
from mlx_qwen35.budget.roofline import decode_speed, prefill_speed, token_bytes
from mlx_qwen35.cache.kv_format import FORMS, UNQUANTIZED, KVFormat
from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.adapter_choice import Chosen
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.dtypes import DTYPES
from mlx_qwen35.checkpoint.names import MTP, VISION
from mlx_qwen35.convert.planned import planned
from mlx_qwen35.convert.recipes import RECIPES, StorageOptions
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import choose_dtype, stored_dtype

MACS = ((8, "M1"), (16, "M1"), (32, "M1 Pro"))  # GB, and the slowest chip that a Mac with so much was sold with
CONTEXT = 8192  # tokens that are planned for where nothing is said
CONTEXTS = (CONTEXT, 32_768, 131_072)
LEAST = 200_000_000  # bytes of a token, below which launches take the time, of which the formula knows nothing
AS_IS = "as it is"


@dataclass(frozen=True)
class Row:
    """One form of storage on one machine at one context.

    stored: AS_IS, or the recipe that it would be converted by. decode, prefill: tokens a second, computed; None where
    the chip is not known. kv_bits: where the plan does not fit, the most bits of keys and values with which it does.
    """

    stored: str
    plan: MemoryPlan
    decode: float | None
    prefill: float | None
    kv_bits: str | None


def forms(folder: Path, rope_scaling: str | None = None) -> dict[str, Checkpoint]:
    """A folder, or its headers, as it is, and by every recipe that quantizes, where it is not quantized itself."""
    found = {AS_IS: open_checkpoint(folder, rope_scaling=rope_scaling)}
    if any(found[AS_IS].quantization(name) for name in found[AS_IS].entries if not name.startswith(MTP)):
        return found
    recipes = [name for name, recipe in RECIPES.items() if recipe.bulk]
    options = (StorageOptions(recipe=name, rope_scaling=rope_scaling) for name in recipes)
    return found | {name: planned(folder, option) for name, option in zip(recipes, options, strict=True)}


def machines(checkpoint: Checkpoint, dtype: str | None, limit: int, kv: KVFormat = UNQUANTIZED) -> list[Machine]:
    """This machine, and MACS. limit: bytes that a model may take here. kv: the form of keys and values."""
    stored = stored_dtype(checkpoint)
    on_m1 = DTYPES[dtype] if dtype else mx.float16 if stored == mx.bfloat16 else stored
    here = this_machine(checkpoint.config.text, choose_dtype(checkpoint, dtype), limit, kv)
    return [here, *(mac(gigabytes, on_m1, kv, chip) for gigabytes, chip in MACS)]


def contexts(checkpoint: Checkpoint, asked: int | None) -> list[int]:
    """The contexts to plan for, the one that is asked for first. InputError where it is too long."""
    most = checkpoint.config.text.max_position_embeddings
    if asked is not None and not 1 <= asked <= most:
        raise InputError("option_invalid", f"--context must be 1 to {most:,} tokens for this model, got {asked:,}")
    return list(dict.fromkeys([asked or min(CONTEXT, most), *(n for n in CONTEXTS if n <= most)]))


def rows(
    stored: Mapping[str, Checkpoint], found: Sequence[Machine], lengths: Sequence[int], mtp: int = 0,
    adapters: Sequence[Adapter] = (),
) -> Iterator[Row]:
    """A row for each form of storage, context and machine, in this order, with an image where the model sees.

    lengths: contexts. mtp, adapters: as for `plan_memory`. All forms of storage are read in the same chunks.
    """
    chunks: dict[tuple[int, str], int] = {}
    for name, checkpoint in stored.items():
        pixels = PIXELS if checkpoint.has(VISION) else 0
        for context, machine in product(sorted(lengths), found):
            chunk = chunks.get((context, machine.name))
            plan = plan_memory(
                checkpoint, machine, context, pixels=pixels, chunk=chunk, mtp=mtp, adapters=adapters
            )
            chunks[context, machine.name] = plan.chunk
            yield Row(name, plan, *_speeds(checkpoint, plan), _kv_bits(checkpoint, plan, mtp, adapters))


def _speeds(checkpoint: Checkpoint, plan: MemoryPlan) -> tuple[float | None, float | None]:
    chip, moved = plan.machine.chip, token_bytes(checkpoint, plan)
    if chip is None or moved < LEAST:
        return None, None
    return decode_speed(moved, chip), prefill_speed(checkpoint.config.text, plan.context, chip)


def _kv_bits(checkpoint: Checkpoint, plan: MemoryPlan, mtp: int, adapters: Sequence[Adapter]) -> str | None:
    text, machine = checkpoint.config.text, plan.machine
    if plan.fits:
        return None
    smaller = machine.kv.smaller(text.head_dim)
    in_form = (replace(machine, kv=KVFormat.of(form, machine.kv.rotate)) for form in smaller)
    fitting = (
        plan_memory(checkpoint, one, plan.context, chunk=plan.chunk, mtp=mtp, adapters=adapters).fits for one in in_form
    )
    return next((form for form, fits in zip(smaller, fitting, strict=True) if fits), None)


def longest_contexts(checkpoint: Checkpoint, plan: MemoryPlan, mtp: int = 0) -> dict[str, int]:
    """Bits of keys and values -> the most tokens of a conversation that fits a plan's machine; 16: the plan's dtype."""
    found = [kv for kv in (UNQUANTIZED, *map(KVFormat.of, FORMS)) if kv.fits(checkpoint.config.text.head_dim)]
    return {kv.name: longest_context(checkpoint, plan, kv, mtp) for kv in found}


@dataclass(frozen=True)
class Planned:
    """A model and all that --plan found of it. The first machine is this one, the first context that is asked for.

    adapters: names of those that are counted. given: the options of `load` that it was computed with, for the commands
    that are advised.
    """

    name: str
    stored: Mapping[str, Checkpoint]
    machines: Sequence[Machine]
    contexts: Sequence[int]
    mtp: int
    rows: Sequence[Row]
    adapters: Sequence[str] = ()
    given: Mapping[str, object] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.stored[AS_IS]

    @property
    def here(self) -> Machine:
        return self.machines[0]

    def row(self, stored: str, context: int | None = None, machine: Machine | None = None) -> Row:
        """By default of this machine, and of the context that was asked for."""
        wanted = stored, context or self.contexts[0], machine or self.here
        return next(row for row in self.rows if (row.stored, row.plan.context, row.plan.machine) == wanted)


def plan_model(
    name: str, folder: Path, context: int | None, dtype: str | None, mtp: int, limit: int, kv: KVFormat,
    rope_scaling: str | None = None, chosen: Chosen | None = None,
) -> Planned:  # fmt: skip
    """Plan the model of this name from a folder, or its headers, with these adapters. For the rest see the functions
    above.
    """
    chosen = chosen or Chosen()
    stored = {form: own.replacing(chosen.whole) for form, own in forms(folder, rope_scaling).items()}
    lengths, found = contexts(stored[AS_IS], context), machines(stored[AS_IS], dtype, limit, kv)
    planned = list(rows(stored, found, lengths, mtp, chosen.listed))
    return Planned(name, stored, found, lengths, mtp, planned, list(chosen.adapters))
