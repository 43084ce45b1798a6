"""A step of training in worker processes, measured in turn: tokens a second and memory, beside mlx-lm's trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mlx_qwen35.backend import backend
from mlx_qwen35.bench.measure import OURS, ProgramError, Worker, in_turn
from mlx_qwen35.bench.report import header, ratio
from mlx_qwen35.bench.scatter import ratios, scatter, warning, with_scatter
from mlx_qwen35.bench.train_worker import RANK
from mlx_qwen35.console.table import align
from mlx_qwen35.errors import InputError

PEERS = {"mlx-lm": ("mlx-lm", "mlx-lm, checkpointed")}  # as --compare names them, and how each is run
_COLUMNS = ("program", "tokens", "tok/s", "seconds", "CPU seconds", "MLX peak", "beside weights", "max RSS",
            "ours: speed", "memory", "beside weights")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...]
    repeats: int
    dtype: str


@dataclass(frozen=True)
class Run:
    """One step of one program. seconds, cpu_seconds: of a step. loss: before it, the same for all programs in their first step.

    weight_bytes: what MLX held before, mostly weights.
    """

    program: str
    tokens: int
    round: int
    seconds: float
    cpu_seconds: float
    loss: float
    mlx_peak_bytes: int
    weight_bytes: int
    max_rss_bytes: int

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def beside(self) -> int:
        """Bytes that the step took beside the weights."""
        return self.mlx_peak_bytes - self.weight_bytes


@dataclass(frozen=True)
class Summary:
    """One program at one length: medians over its rounds, and our ratios to it, round by round."""

    program: str
    tokens: int
    speed: float  # tokens a second
    scatter: float  # from the slowest round to the fastest, in medians
    seconds: float
    cpu_seconds: float
    mlx_peak_bytes: int
    beside: int
    max_rss_bytes: int
    ours_speed: float | None  # our speed over its: above 1 we are faster
    ours_memory: float | None  # its peak over ours: above 1 we take less
    ours_beside: float | None  # the same beside the weights


def peers(names: Sequence[str]) -> tuple[str, ...]:
    """The programs beside ours. InputError for one that does not train."""
    if unknown := [name for name in names if name not in PEERS]:
        raise InputError("option_conflict", f"--train takes --compare mlx-lm alone; {unknown[0]} is not compared")
    return tuple(own for name in names for own in PEERS[name])


def measure(
    workers: Sequence[Worker], settings: Settings, failures: dict[str, str], progress: Callable[[str], None]
) -> list[Run]:
    """For each length `repeats` rounds, in which each program makes a step; on a GPU one more first, not timed.

    A program that fails goes to `failures` without its runs at this length and longer ones. The others go on, unless
    ours has failed.
    """
    by_name, runs = {worker.name: worker for worker in workers}, list[Run]()
    steps = 2 if backend().fused_kernels else 1
    for tokens in settings.lengths:
        for round in range(settings.repeats):
            for name in in_turn([name for name in by_name if name not in failures], round):
                progress(f"{tokens} tokens, round {round + 1}: {name}")
                try:
                    reply = by_name[name].ask(tokens=tokens, steps=steps)
                except ProgramError as error:
                    failures[name] = f"{error}, at {tokens} tokens"
                    if OURS in failures:
                        return []
                else:
                    runs.append(Run(name, tokens, round, **reply))
    whole = {key: len([run for run in runs if (run.program, run.tokens) == key]) == settings.repeats
             for key in {(run.program, run.tokens) for run in runs}}  # fmt: skip
    return [run for run in runs if whole[run.program, run.tokens]]


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """The summary of each program and length."""
    keys = dict.fromkeys((run.tokens, run.program) for run in sorted(runs, key=lambda run: run.tokens))
    of = {key: [run for run in runs if (run.tokens, run.program) == key] for key in keys}
    return [_summary(own, of[tokens, OURS]) for (tokens, _), own in of.items()]


def _summary(own: Sequence[Run], ours: Sequence[Run]) -> Summary:
    own, ours = sorted(own, key=lambda run: run.round), sorted(ours, key=lambda run: run.round)
    speeds = [run.speed for run in own]
    return Summary(
        own[0].program, own[0].tokens, median(speeds), scatter(speeds), median(run.seconds for run in own),
        median(run.cpu_seconds for run in own),
        max(run.mlx_peak_bytes for run in own), max(run.beside for run in own), max(run.max_rss_bytes for run in own),
        ours_speed=ratios([run.speed for run in ours], speeds),
        ours_memory=ratios([run.mlx_peak_bytes for run in own], [run.mlx_peak_bytes for run in ours]),
        ours_beside=ratios([run.beside for run in own], [run.beside for run in ours]),
    )  # fmt: skip


def format_table(machine: Mapping[str, str], model: str, settings: Settings, rows: Sequence[Summary]) -> str:
    """The text the command prints."""
    shares = {f"{row.program} at {row.tokens:,} tokens": row.scatter for row in rows}
    lines = [
        *header(machine),
        f"{'model:':10}{model}, {settings.dtype}; {settings.repeats} rounds of every program in turn",
        f"{'step:':10}one row, whose tokens are all targets; low-rank parts of rank {RANK} beside all maps; AdamW",
        "",
        *align([_COLUMNS, *map(_cells, rows)]),
        "",
        "medians over rounds; ~: from the slowest round to the fastest, of the median",
        "ours: our speed over the program's, its memory over ours, round by round",
        *warning(shares),
    ]
    return "\n".join(lines)


def _cells(row: Summary) -> tuple[str, ...]:
    shown = map(ratio, (row.ours_speed, row.ours_memory, row.ours_beside))
    sizes = (f"{count / 1e9:.2f} GB" for count in (row.mlx_peak_bytes, row.beside, row.max_rss_bytes))
    return (
        row.program, f"{row.tokens:,}", with_scatter(f"{row.speed:.1f}", row.scatter), f"{row.seconds:.2f}",
        f"{row.cpu_seconds:.2f}", *sizes,
        *(("", "", "") if row.program == OURS else shown),
    )  # fmt: skip
