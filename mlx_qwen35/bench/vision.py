"""Memory that images and clips take: which are shown, in a process each, and the table of what was held.

A fresh process for each: MLX's peak could be reset, but the process's own cannot, and one that the system ends for its
memory takes no other with it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_qwen35.bench.measure import OURS, ProgramError, Worker
from mlx_qwen35.bench.report import describe_machine, header
from mlx_qwen35.config import VisionConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.streams import write_file
from mlx_qwen35.table import align

MEGAPIXEL = 1 << 20
_COLUMNS = (
    "MB of 10^6 bytes", "tokens", "text", "tower", "embeddings", "cache", "encoding: peak", "working", "budget",
    "reading: peak", "working", "released", "at the end", "max RSS", "encoding s", "reading s",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An image (1 frame) or a clip to be shown."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        size = f"{self.width}x{self.height}"
        return f"image {size}" if self.frames == 1 else f"clip {size}, {self.frames} frames"


@dataclass(frozen=True)
class Settings:
    """Sizes are of all clips and not of images, which are squares of so many megapixels."""

    image_megapixels: tuple[float, ...]
    clip_frames: tuple[int, ...]
    clip_size: tuple[int, int]  # width, height
    prefill_step_size: int
    dtype: str

    def cases(self, config: VisionConfig) -> list[Case]:
        """InputError for a clip that the tower's patches do not divide."""
        factor, pair = config.patch_size * config.spatial_merge_size, config.temporal_patch_size
        width, height = self.clip_size
        if self.clip_frames and (width % factor or height % factor):
            raise InputError("option_invalid", f"--clip-size must be two multiples of {factor}, got {width}x{height}")
        if odd := [frames for frames in self.clip_frames if frames % pair]:
            raise InputError("option_invalid", f"--clip-frames must be multiples of {pair}, got {odd[0]}")
        sides = [max(1, round(math.sqrt(size * MEGAPIXEL) / factor)) * factor for size in self.image_megapixels]
        return [*(Case(1, side, side) for side in sides), *(Case(n, height, width) for n in self.clip_frames)]


@dataclass(frozen=True)
class Memory:
    """What was held for one case: bytes of MLX's allocator, and of the process in max_rss_bytes; times in seconds."""

    case: Case
    tokens: int  # of the prompt
    text_bytes: int  # weights
    tower_bytes: int
    embeddings_bytes: int
    cache_bytes: int  # keys and values, their unused columns, and DeltaNet memory, when all has been read
    budget_bytes: int  # of working memory in encoding, as vision.working_bytes states it
    encode_peak_bytes: int
    read_peak_bytes: int
    released_bytes: int  # after the tower was given back
    left_bytes: int  # after embeddings and cache were dropped too
    max_rss_bytes: int
    encode_s: float  # with the time to load the tower
    read_s: float

    @property
    def encode_working_bytes(self) -> int:
        """The peak less what encoding needs and leaves."""
        return self.encode_peak_bytes - self.text_bytes - self.tower_bytes - self.embeddings_bytes

    @property
    def read_working_bytes(self) -> int:
        return self.read_peak_bytes - self.text_bytes - self.embeddings_bytes - self.cache_bytes


def measure_memory(
    folder: Path, cases: Sequence[Case], settings: Settings, failures: dict[str, str], progress: Callable[[str], None]
) -> tuple[dict[str, str], list[Memory]]:
    """The machine, and a row for each case; one that fails goes to `failures` with the reason, the others go on.

    Raises InputError when none could be measured.
    """
    rows: list[Memory] = []
    environment = None
    for case in cases:
        progress(str(case))
        try:
            with closing(Worker("vision", folder, settings.dtype)) as worker:
                environment = worker.environment
                rows.append(Memory(case, **worker.ask(**asdict(case), step=settings.prefill_step_size)))
        except ProgramError as error:
            failures[str(case)] = str(error)
    if not rows:
        raise InputError(
            "bench_failed", "; ".join(f"{case} could not be measured: {reason}" for case, reason in failures.items())
        )
    return describe_machine({OURS: environment}), rows


def spread(rows: Sequence[Memory]) -> dict[str, float]:
    """Of clips of several lengths, by how much of itself the smallest working memory is exceeded by the largest."""
    clips = [row for row in rows if row.case.frames > 1]
    if len(clips) < 2:
        return {}
    working = {
        "encoding": [row.encode_working_bytes for row in clips],
        "reading": [row.read_working_bytes for row in clips],
    }
    return {phase: max(figures) / max(1, min(figures)) - 1 for phase, figures in working.items()}


def format_memory(machine: Mapping[str, str], model: str, settings: Settings, rows: Sequence[Memory]) -> str:
    """The text the command prints."""
    lines = [
        *header(machine),
        f"{'model:':10}{model}, {settings.dtype}; prompt read {settings.prefill_step_size} tokens at a time",
        "",
        *align([_COLUMNS] + [_cells(row) for row in rows]),
        "",
        "working: MLX's peak in that phase less weights, embeddings and cache as they are at its end. The tower is in "
        "memory in\nencoding only, the cache in reading only. budget: the stated one for working memory in encoding. "
        "released: without the\ntower; at the end: without embeddings and cache too, so as much as the text weights",
    ]
    if shares := spread(rows):
        said = ", ".join(f"{share:.1%} in {phase}" for phase, share in shares.items())
        lines.append(f"clips of different lengths: the largest working memory exceeds the smallest by {said}")
    return "\n".join(lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _cells(row: Memory) -> tuple[str, ...]:
    sizes = (
        row.text_bytes, row.tower_bytes, row.embeddings_bytes, row.cache_bytes, row.encode_peak_bytes,
        row.encode_working_bytes, row.budget_bytes, row.read_peak_bytes, row.read_working_bytes, row.released_bytes,
        row.left_bytes, row.max_rss_bytes,
    )  # fmt: skip
    return (str(row.case), f"{row.tokens}", *map(_mb, sizes), f"{row.encode_s:.1f}", f"{row.read_s:.1f}")


def write_memory(
    path: Path,
    machine: Mapping[str, str],
    model: str,
    settings: Settings,
    rows: Sequence[Memory],
    failures: Mapping[str, str],
) -> None:
    """The table as JSON, in bytes and seconds."""
    working = ("encode_working_bytes", "read_working_bytes")
    content = {
        "machine": dict(machine), "model": model, "settings": asdict(settings), "failures": dict(failures),
        "rows": [asdict(row) | {name: getattr(row, name) for name in working} for row in rows], "spread": spread(rows),
    }  # fmt: skip
    write_file(path, json.dumps(content, indent=2) + "\n")
