"""The machine: which Apple chip it has, and the settings of MLX that suit it.

A chip's speed is its maker's figure for the smallest one sold under its name, so an estimate is rather too slow than
too fast. An unknown chip counts as the slowest.
"""

import functools
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.backend import TF32
from mlx_qwen35.errors import InputError

_PEAK = {1: 2.3e12, 2: 2.9e12, 3: 2.8e12, 4: 3.4e12}  # operations a second of the plain chip of a generation
_TIMES = {"": 1, "Pro": 1.75, "Max": 3.4, "Ultra": 6.8}  # and of the larger ones, as many times that
_BANDWIDTH = {  # bytes a second of the generations from M1 on
    "": (68e9, 100e9, 100e9, 120e9, 153e9), "Pro": (200e9, 200e9, 150e9, 273e9, 307e9),
    "Max": (400e9, 400e9, 300e9, 410e9, 460e9), "Ultra": (800e9, 800e9, 819e9),
}  # fmt: skip
LATEST = 5  # generation whose bandwidth is known
TUNED_UP_TO = 4  # generations for which larger command buffers were published to pay
_NATIVE_BFLOAT16 = 3  # from this generation on


@dataclass(frozen=True)
class Chip:
    """An Apple chip: name "Apple M1 Pro", generation 1, tier "" (plain), "Pro", "Max" or "Ultra"."""

    name: str
    generation: int
    tier: str

    @property
    def native_bfloat16(self) -> bool:
        """Whether it computes in bfloat16; M1 and M2 do so by converting every number."""
        return self.generation >= _NATIVE_BFLOAT16

    @property
    def flops(self) -> float:
        """Peak 16-bit operations a second; of an unknown chip those of the slowest, enough to choose chunks by."""
        return _PEAK.get(self.generation, min(_PEAK.values())) * _TIMES[self.tier]

    @property
    def knows_flops(self) -> bool:
        """Whether `flops` is a published figure, and not that of the slowest chip."""
        return self.generation in _PEAK

    @property
    def bandwidth(self) -> float:
        """Bytes a second between memory and chip."""
        known = _BANDWIDTH[self.tier]
        return known[self.generation - 1] if 1 <= self.generation <= len(known) else min(known)


def parse_chip(brand: str) -> Chip:
    """The chip of a brand string such as "Apple M2 Max"; an unknown one counts as new, and as slow as the slowest."""
    found = re.match(r"Apple M(\d+)\b(?: (Pro|Max|Ultra))?", brand)
    return Chip(brand, int(found[1]), found[2] or "") if found else Chip(brand, LATEST + 1, "")


def chip_name(option: str, name: str) -> str:
    """The name of a chip whose bandwidth is known, such as "M2 Max", however its letters are written, or InputError.

    option: what the error calls it.
    """
    found = re.fullmatch(r"M(\d+)(?: (Pro|Max|Ultra))?", name.strip(), re.ASCII | re.IGNORECASE)
    if found:
        generation, tier = int(found[1]), (found[2] or "").title()
        if 1 <= generation <= len(_BANDWIDTH[tier]):
            return f"M{generation} {tier}".strip()
    raise InputError(
        "option_invalid", f"{option} must be one of M1 to M{LATEST}, also as 'M1 Pro', 'M1 Max' or, up to "
        f"M{len(_BANDWIDTH['Ultra'])}, 'M1 Ultra', got {name!r}"
    )  # fmt: skip


@functools.cache
def this_chip() -> Chip | None:
    """The chip of this Mac, or None on another machine. The system is asked, so that MLX need not start."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return None
    asked = subprocess.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
    return parse_chip(asked.stdout.strip() or "Apple, unknown")


def brand() -> str:
    """The processor's name, on any machine."""
    if chip := this_chip():
        return chip.name
    for line in Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- command buffers -------------------------------------------------------------------------------------------------

# MLX hands work to the GPU in command buffers, and ends one at so many operations or so many MB of arrays (by its
# sources it counts their elements). Published: on M1 to M4 larger ones decode 5 to 13 % faster; on M5 they change
# nothing. Prefill ends one with each layer, whatever these say.
OPERATIONS, MEGABYTES = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
TUNED = {OPERATIONS: 1000, MEGABYTES: 200}


@dataclass(frozen=True)
class CommandBuffers:
    """Where MLX ends a command buffer."""

    operations: int
    megabytes: int


def tune() -> None:
    """Set the environment for MLX: exact float32 products everywhere, the command buffers of this chip.

    The user's values win. Commands call it before MLX's first array.
    """
    os.environ.setdefault(TF32, "0")
    chip = this_chip()
    if chip is not None and chip.generation <= TUNED_UP_TO:
        for name, value in TUNED.items():
            os.environ.setdefault(name, str(value))


def command_buffers(chip: Chip, environ: Mapping[str, str] | None = None) -> CommandBuffers:
    """MLX's limits on this chip: the environment's values, else its own (mlx/backend/metal/device.cpp)."""
    given = os.environ if environ is None else environ
    own = 50 if chip.tier in ("Max", "Ultra") else 40
    return CommandBuffers(*(_number(given.get(name), own) for name in (OPERATIONS, MEGABYTES)))


def _number(text: str | None, otherwise: int) -> int:
    """As MLX reads it: the digits at the beginning, 0 where there are none."""
    if text is None:
        return otherwise
    found = re.match(r"\s*[+-]?\d+", text)
    return int(found[0]) if found else 0
