"""The answer of --plan in sentences: whether a model runs here, how fast, how long a context, and what else to do."""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from mlx_qwen35.console.table import size
from mlx_qwen35.convert.recipes import DEFAULT
from mlx_qwen35.doctor.plan import AS_IS, Planned, Row, longest_contexts
from mlx_qwen35.options import as_flag

WORTH = 0.75  # of the memory that a model takes, below which a conversion is advised where the model fits as it is
CONVERTING = ("revision", "dtype", "rope_scaling")  # the options of a plan that convert takes
LOADING = (*CONVERTING, "memory_limit", "kv_bits", "kv_rotate", "adapter", "adapter_scale")  # and what loads a model


class Advice(NamedTuple):
    """A sentence, and the command that does what it says; "" for none."""

    text: str
    command: str = ""


def speed(tokens: float) -> str:
    """Of tokens a second."""
    return f"{tokens:.0f}" if tokens >= 10 else f"{tokens:.1f}"


def advice(planned: Planned) -> Iterator[Advice]:
    """The answer first, then what makes room."""
    row = planned.row(AS_IS)
    longest = longest_contexts(planned.checkpoint, row.plan, planned.mtp)
    yield Advice(_answer(planned, row))
    if row.plan.fits:
        yield _speeds(planned, row)
    yield from _context(planned, row, longest)
    recipe = advised(planned)
    if recipe:
        yield _conversion(planned, row, recipe)
    elif not any(longest.values()):
        yield Advice("Choose a smaller model of the family. What fits is listed by:", "mlx_qwen35 models fit")


def advised(planned: Planned) -> Row | None:
    """The recipe to convert by: the default, or else the first that fits here; None where none does, or little is won.
    """
    found = [planned.row(name) for name in (DEFAULT, *planned.stored) if name in planned.stored and name != AS_IS]
    best = next((row for row in found if row.plan.fits), next((row for row in found if row.kv_bits), None))
    own = planned.row(AS_IS).plan
    return best if best and (not own.fits or best.plan.image < WORTH * own.image) else None


def _answer(planned: Planned, row: Row) -> str:
    plan, chip = row.plan, row.plan.machine.chip
    where, limit = f"this machine ({chip.name})" if chip else "this machine", size(plan.machine.limit)
    if not plan.fits:
        return (
            f"{planned.name} does not fit {where} {AS_IS}: {plan.context:,} tokens take {size(plan.text)}, and a model "
            f"may take {limit}."
        )
    if plan.image > plan.machine.limit:
        return (
            f"{planned.name} runs on {where} with text: {plan.context:,} tokens take {size(plan.text)} of the {limit} "
            f"that a model may take. Images do not fit: they take {size(plan.image)}."
        )
    return (
        f"{planned.name} runs on {where}: {plan.context:,} tokens take {size(plan.image)} of the {limit} that a model "
        "may take."
    )


def _speeds(planned: Planned, row: Row) -> Advice:
    if row.decode is None:
        command = _command(planned, ("doctor", "--model", planned.name), LOADING)
        return Advice("Its speed is not known. To measure:", command)
    if row.prefill is None:
        return Advice(f"Computed, not measured: {speed(row.decode)} tokens a second. Its prefill speed is not known.")
    return Advice(
        f"Computed, not measured: {speed(row.decode)} tokens a second, after {row.plan.context / row.prefill:,.0f} s "
        f"for a prompt of {row.plan.context:,}."
    )


def _context(planned: Planned, row: Row, longest: Mapping[str, int]) -> Iterator[Advice]:
    """How long a conversation may become, and what makes room for a longer one."""
    own, most = longest[_bits(row)], planned.checkpoint.config.text.max_position_embeddings
    if own:
        yield Advice(f"Longest conversation: {own:,} tokens{', all that the model takes' * (own >= most)}.")
    wider = {bits: tokens for bits, tokens in longest.items() if bits != "16" and tokens > own}
    if bits := row.kv_bits or next(iter(wider), None):
        yield Advice(
            f"--kv-bits {bits} makes room for {longest[bits]:,}:",
            _command(planned, ("chat", "--model", planned.name), LOADING, kv_bits=bits),
        )


def _conversion(planned: Planned, row: Row, recipe: Row) -> Advice:
    plan, name = recipe.plan, recipe.stored
    longest = longest_contexts(planned.stored[name], plan, planned.mtp)[recipe.kv_bits or _bits(recipe)]
    fits = "it takes" if row.plan.fits else "it fits:"
    options = f" with --kv-bits {recipe.kv_bits}" if recipe.kv_bits else ""
    amount = "" if options else f" {size(plan.image)},"
    fast = f", {speed(recipe.decode)} tokens a second (computed)" if recipe.decode else ""
    folder = f"{planned.name.rstrip('/').split('/')[-1]}-{name}"
    return Advice(
        f"Converted by recipe {name}{options} {fits}{amount} up to {longest:,} tokens{fast}:",
        _command(planned, ("convert", "--hf-path", planned.name, "--mlx-path", folder), CONVERTING, recipe=name),
    )


def _bits(row: Row) -> str:
    """Of keys and values, as `longest_contexts` names them: rotated or not, they take the same memory."""
    return replace(row.plan.machine.kv, rotate=False).name


def _command(planned: Planned, words: Sequence[str], takes: Collection[str], **advised: str) -> str:
    return command(planned.given, words, takes, **advised)


def command(given: Mapping[str, object], words: Sequence[str], takes: Collection[str], **advised: str) -> str:
    """A command to paste into a shell, with what it takes of the options that were given.

    advised: more options, which come before given ones of the same name.
    """
    kept = {name: value for name, value in given.items() if name in takes and value and name not in advised}
    each = [(name, value if isinstance(value, list) else [value]) for name, value in (kept | advised).items()]
    options = [(as_flag(name), *(() if one is True else (str(one),))) for name, values in each for one in values]
    return shlex.join(["mlx_qwen35", *words, *chain(*options)])
