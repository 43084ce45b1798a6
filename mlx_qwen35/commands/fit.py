"""mlx_qwen35 models fit: which recipe of which size fits a machine, and how fast it decodes, computed from headers.

Memory and context are those of the memory plan, speed is the roofline's. Nothing is downloaded, and nothing measured.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_qwen35.backend import system_memory
from mlx_qwen35.budget.plan import Machine, longest_context, mac, plan_memory, this_machine
from mlx_qwen35.budget.roofline import decode_speed, token_bytes
from mlx_qwen35.cache.kv_format import UNQUANTIZED
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_headers
from mlx_qwen35.console.table import align
from mlx_qwen35.convert.planned import planned
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.load import choose_dtype
from mlx_qwen35.machine.chip import this_chip

SIZES = ("0.8b", "2b", "4b", "9b", "27b")
RECIPES = ("bf16", "8bit", "6bit", "4bit")  # the most bits first
CONTEXT, PIXELS = 8192, 1 << 20  # tokens and an image that memory is computed for
FAST, LONG, LEFT = 10, 32_768, 5e9  # tokens/s, tokens of context, and bytes for other programs that suffice
RULE = (
    f"the largest, in the most bits, that gives {FAST} tokens/s,\nhas a context of {LONG:,} and leaves "
    f"{LEFT / 1e9:.0f} GB to macOS and other programs"
)


@dataclass(frozen=True)
class Fit:
    """How a recipe of a size of the family fits a machine.

    disk, memory, left: bytes, of its folder, at most in use, and beside that. longest: tokens of the longest
    conversation; 0: it does not fit. speed: of decoding, in tokens/s; None for a chip of unknown figures.
    """

    size: str
    recipe: str
    disk: int
    memory: int
    left: int
    longest: int
    speed: float | None

    @property
    def name(self) -> str:
        return f"Qwen/Qwen3.5-{self.size.upper()}"

    @property
    def command(self) -> str:
        recipe = "" if self.recipe == "bf16" else f" --recipe {self.recipe}"
        return f"mlx_qwen35 chat --model {self.name}{recipe}"

    @property
    def is_enough(self) -> bool:
        return self.longest >= LONG and self.left >= LEFT and (self.speed is None or self.speed >= FAST)


def checkpoints(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, Checkpoint]]:
    """Size, recipe and the checkpoint that a conversion would write, whose weights are holes."""
    with tempfile.TemporaryDirectory(prefix="mlx_qwen35-fit-") as name:
        for size, recipe in pairs:
            source = Path(name) / size
            if not source.exists():
                write_headers(source, geometry(size))
            converted = recipe != "bf16"
            yield size, recipe, planned(source, StorageOptions(recipe)) if converted else open_checkpoint(source)


def fit(size: str, recipe: str, checkpoint: Checkpoint, machine: Machine, memory: int) -> Fit:
    """memory: bytes that the machine has."""
    plan = plan_memory(checkpoint, machine, CONTEXT, pixels=PIXELS)
    fits = plan.fits and plan.image <= machine.limit
    longest = longest_context(checkpoint, plan, UNQUANTIZED) if fits else 0
    speed = decode_speed(token_bytes(checkpoint, plan), machine.chip) if machine.chip else None
    disk = sum(entry.nbytes for entry in checkpoint.entries.values())
    return Fit(size, recipe, disk, plan.image, memory - plan.image, longest, speed)


def fits(limit: int, gigabytes: float | None = None, chip: str = "M1") -> tuple[Machine, list[Fit]]:
    """A machine, and every recipe of every size on it, the largest first.

    limit: bytes that a model may take on this machine. gigabytes, chip: of a Mac, in the place of this machine.
    """
    found, here = [], this_chip()
    memory = system_memory() if gigabytes is None else int(gigabytes * 2**30)
    for size, recipe, checkpoint in checkpoints((size, recipe) for size in reversed(SIZES) for recipe in RECIPES):
        if gigabytes is None:
            name = f"This machine, {here.name if here else 'no Mac'}"
            machine = this_machine(checkpoint.config.text, choose_dtype(checkpoint, None), limit)
            machine = replace(machine, name=name, chip=here)
        else:
            machine = mac(gigabytes, chip=chip)
        found.append(fit(size, recipe, checkpoint, machine, memory))
    return machine, found


def recommended(found: Sequence[Fit]) -> Fit | None:
    """By RULE; where there is none, the smallest."""
    fitting = [fit for fit in found if fit.longest]
    return next((fit for fit in fitting if fit.is_enough), fitting[-1] if fitting else None)


def format_fits(machine: Machine, found: Sequence[Fit]) -> str:
    """The table, and what to type."""
    fitting = [fit for fit in found if fit.longest]
    best = recommended(found)
    head = ("", "model", "recipe", "on disk", "memory", "longest context", "tokens/s")
    rows = [
        ("*" if fit is best else "", fit.size.upper(), fit.recipe, _gb(fit.disk), _gb(fit.memory), f"{fit.longest:,}",
         "?" if fit.speed is None else f"{fit.speed:.0f}")
        for fit in fitting
    ]  # fmt: skip
    smallest = {fit.size: fit for fit in found if fit.size not in {fit.size for fit in fitting}}
    large = [f"{size.upper()} ({fit.recipe} takes {_gb(fit.memory)})" for size, fit in smallest.items()]
    speeds = "computed from the chip's memory bandwidth, not measured" if machine.chip else "not known of this machine"
    lines = [f"{machine.name}: a model may take {_gb(machine.limit)}", "", *(align([head, *rows]) if rows else [])]
    if large:
        lines += ["", f"Too large: {', '.join(large)}"]
    lines += [
        "", f"Memory: at most, with {CONTEXT:,} tokens and an image of a megapixel.",
        f"Tokens/s: {speeds}.",
    ]  # fmt: skip
    if best:
        lines += ["", f"Recommended (*): {RULE if best.is_enough else 'the smallest'}:", f"  {best.command}"]
    else:
        lines += ["", "None fits. nano, which comes with the package, does:", "  mlx_qwen35 chat --model nano"]
    return "\n".join(lines)


def as_json(machine: Machine, found: Sequence[Fit]) -> dict[str, object]:
    best = recommended(found)
    return {
        "machine": machine.name,
        "chip": machine.chip.name if machine.chip else None,
        "limit_bytes": machine.limit,
        "context": CONTEXT,
        "image_pixels": PIXELS,
        "fits": [
            {
                "model": fit.name, "recipe": fit.recipe, "disk_bytes": fit.disk, "memory_bytes": fit.memory,
                "fits": fit.longest > 0, "longest_context": fit.longest, "computed_decode_tokens_per_second": fit.speed,
                "recommended": fit is best, "command": fit.command,
            }
            for fit in found
        ],
    }  # fmt: skip


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
