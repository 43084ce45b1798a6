"""The text of --plan: the answer, memory as bars, speeds by recipe and context, and with --verbose every part."""

from collections.abc import Iterator, Sequence
from textwrap import wrap

from rich.console import Console
from rich.text import Text

from mlx_qwen35.budget.plan import PIXELS, Machine, MemoryPlan
from mlx_qwen35.budget.roofline import DECODE, PREFILL
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.console.safe import safe, safe_name
from mlx_qwen35.console.table import align, size
from mlx_qwen35.doctor.advice import advice, advised, speed
from mlx_qwen35.doctor.bars import bar, coloured, legend
from mlx_qwen35.doctor.plan import AS_IS, Planned, Row, longest_contexts

ROOM = 20  # columns, below which what is left beside names and figures is no bar: it has a line of its own
_PARTS = (
    ("text weights", "weights"), ("draft head", "drafts"), ("adapters", "adapters"), ("keys and values", "kv"),
    ("DeltaNet state", "state"), ("prefill of a chunk", "prefill"), ("sampling a token", "sampling"),
    ("buffers that MLX keeps", "buffers"),
)  # fmt: skip
_IMAGE = (("vision encoder", "vision_encoder"), ("encoding an image", "encoding"))
_NOTES = (
    "Prefill and sampling take turns: the larger counts. The state is held twice.",
    "Most tokens: of a conversation, by the form of its keys and values (--kv-bits), in steps of 1,024.",
    f"The image has {PIXELS / 2**20:g} x 2^20 pixels. It is encoded before keys and values are allocated; then the "
    "vision encoder is unloaded.",
)


def show(planned: Planned, console: Console, verbose: bool = False) -> None:
    """Print the answer and what it rests on. verbose: every recipe and context as a bar, and the parts in figures."""
    for text, command in advice(planned):
        _say(console, text)
        if command:
            _print(console, Text(f"  {safe_name(command)}", "bold"))
    _print(console)
    _show_bars(planned, console, verbose)
    _print(console)
    _show_speeds(planned, console)
    for name in planned.stored if verbose else ():
        _print(console, "", *_parts(planned, name))


def _print(console: Console, *lines: str | Text) -> None:
    """Lines as they are, however wide."""
    for line in lines or ("",):
        console.print(safe(line) if isinstance(line, str) else line, highlight=False, markup=False, soft_wrap=True)


def _say(console: Console, text: str) -> None:
    _print(console, *wrap(text, console.width, break_long_words=False, break_on_hyphens=False))


# --- bars ------------------------------------------------------------------------------------------------------------


def _show_bars(planned: Planned, console: Console, verbose: bool) -> None:
    """A bar for each machine; with verbose, for each form of storage and each context on it."""
    shown = list(planned.stored) if verbose else [(advised(planned) or planned.row(AS_IS)).stored]
    lengths = sorted(planned.contexts) if verbose else planned.contexts[:1]
    found = [planned.row(name, n, one) for one in planned.machines for name in shown for n in lengths]
    form = "" if shown == [AS_IS] else f", by recipe {shown[0]}"
    image = " and an image" if found[0].plan.vision_encoder else ""
    _say(console, "Memory" if verbose else f"Memory at {planned.contexts[0]:,} tokens{image}{form}")
    names = [_name(row, verbose) for row in found]
    ends = [_end(row.plan) for row in found]
    left, blocks = max(map(len, names)) + 2, coloured(console)
    room = console.width - left - max(map(len, ends)) - 2
    for name, end, row in zip(names, ends, found, strict=True):
        if room < ROOM:
            _say(console, f"{name}: {end}")
            _print(console, bar(row.plan, console.width, blocks))
        else:
            _print(console, Text.assemble(name.ljust(left), bar(row.plan, room, blocks), f"  {end}"))
    _print(console, legend([row.plan for row in found], blocks, console.width))


def _name(row: Row, verbose: bool) -> str:
    plan = row.plan
    return f"{plan.machine.name}, {row.stored}, {plan.context:,}" if verbose else plan.machine.name


def _end(plan: MemoryPlan) -> str:
    limit = plan.machine.limit
    fits = "" if plan.image <= limit else ", text only" if plan.fits else ", no"
    return f"{size(plan.image).removesuffix(' GB')} of {size(limit)}{fits}"


# --- speeds ----------------------------------------------------------------------------------------------------------


def _show_speeds(planned: Planned, console: Console) -> None:
    """A row for each recipe and context; on a narrow terminal one table for each machine."""
    _say(console, "Tokens a second, decode / prefill, computed from the chip's figures")
    heads = [machine.name for machine in planned.machines]
    table = align(_speed_table(planned, planned.machines, heads))
    if len(table[0]) <= console.width:
        _print(console, *table)
    else:
        for machine in planned.machines:
            kinds = (align(_speed_table(planned, [machine], ["tokens/s"], joined)) for joined in (True, False))
            _print(console, "", machine.name, *min(kinds, key=lambda lines: len(lines[0]) > console.width))
        _print(console)
    for line in _formula(planned.machines):
        _say(console, line)


def _speed_table(
    planned: Planned, machines: Sequence[Machine], heads: Sequence[str], joined: bool = True
) -> list[tuple[str, ...]]:
    """joined: whether recipes with the same cells share their rows."""
    named: dict[tuple[object, ...], list[str]] = {}
    for name in planned.stored:
        cells = tuple(
            (f"{context:,}", *(_cell(planned.row(name, context, machine)) for machine in machines))
            for context in sorted(planned.contexts)
        )
        named.setdefault(cells if joined else (name, *cells), []).append(name)
    table = [("stored", "context", *heads)]
    for rows, names in named.items():
        name = "any" if len(names) == len(planned.stored) > 1 else ", ".join(names)
        table += [(name, *cells) for cells in rows if isinstance(cells, tuple)]
    return table


def _cell(row: Row) -> str:
    if not row.plan.fits:
        return f"kv {row.kv_bits}" if row.kv_bits else "no"
    if row.decode is None:
        return "fits"
    return f"{speed(row.decode)} / {'?' if row.prefill is None else speed(row.prefill)}"


def _formula(machines: Sequence[Machine]) -> Iterator[str]:
    yield "no: it does not fit. kv 8: it does with --kv-bits 8. fits: its speed is not known."
    yield "decode: share of bandwidth / bytes of a token (weights, states, keys, values)"
    yield "prefill: share of peak / operations of a token (two a weight, and attention)"
    for chip in {machine.chip.name: machine.chip for machine in machines if machine.chip}.values():
        peak = f"{PREFILL:.0%} of {chip.flops / 1e12:.1f} TFLOPS" if chip.knows_flops else "its peak is not known"
        yield f"{chip.name}: {DECODE[chip.tier]:.0%} of {chip.bandwidth / 1e9:.0f} GB/s, {peak}"


# --- parts -----------------------------------------------------------------------------------------------------------


def _parts(planned: Planned, stored: str) -> list[str]:
    """The table of a form of storage: every part on every machine."""
    found = [planned.row(stored, machine=machine).plan for machine in planned.machines]
    longest = [longest_contexts(planned.stored[stored], plan, planned.mtp) for plan in found]
    title = f"{planned.name}{'' if stored == AS_IS else f', {stored}'}, a context of {found[0].context:,} tokens"
    rows = [
        ("GB (10^9 bytes)", *(plan.machine.name for plan in found)),
        ("a model may take", *(_gb(plan.machine.limit) for plan in found)),
        ("dtype", *(dtype_name(plan.machine.dtype) for plan in found)),
        ("keys and values in", *(_form(plan.machine.kv.name) for plan in found)),
        ("tokens prefilled at a time", *(str(plan.chunk) for plan in found)),
    ]
    counted = [own for own in _PARTS if found[0].adapters or own[1] != "adapters"]
    rows += [(label, *(_gb(getattr(plan, part)) for plan in found)) for label, part in counted]
    rows.append(("text, at most", *(_gb(plan.text) for plan in found)))
    if found[0].vision_encoder:
        rows += [(label, *(_gb(getattr(plan, part)) for plan in found)) for label, part in _IMAGE]
        rows.append(("first turn with an image, at most", *(_gb(plan.image) for plan in found)))
    rows.append(("it fits", *(_fits(plan) for plan in found)))
    rows += [
        (f"most tokens of text in {_form(form)}", *(f"{most[form]:,}" for most in longest)) for form in longest[0]
    ]
    return [title, "", *align(rows), "", *_NOTES[: 3 if found[0].vision_encoder else 2]]


def _form(kv: str) -> str:
    return "the dtype" if kv == "16" else f"{kv} bit"


def _fits(plan: MemoryPlan) -> str:
    if not plan.fits:
        return "no"
    return "yes" if plan.image <= plan.machine.limit else "text only"


def _gb(count: int) -> str:
    return f"{count / 1e9:.3f}"
