"""mlx_qwen35.bench --mtp: decoding with drafts beside decoding without, here, and what is expected of Macs."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mlx_qwen35.bench.expected import DEPTHS, Expected, draft_cost, reading_cost
from mlx_qwen35.bench.measure import OURS, ProgramError, Worker, in_turn
from mlx_qwen35.bench.report import describe_machine, header
from mlx_qwen35.config import TextConfig, parse_config
from mlx_qwen35.errors import InputError
from mlx_qwen35.generate.depth import FALL
from mlx_qwen35.load import DTYPES
from mlx_qwen35.random_checkpoint import geometry, write_random_checkpoint
from mlx_qwen35.streams import write_file
from mlx_qwen35.table import align

READING = 1024  # tokens of the prompt that is read with and without drafts
LIMIT = 160  # tokens of an answer over which acceptance is taken
SEEDS = 8  # over which coupled acceptance is counted
MODES: Mapping[str, tuple[str, int | None]] = {
    "off": ("off", None), "auto": ("auto", None), **{f"on, depth {depth}": ("on", depth) for depth in DEPTHS}
}  # fmt: skip
VAIN, VAIN_TOKENS = "mid", (512, 1000)  # geometry of random weights, whose head guesses nothing


@dataclass(frozen=True)
class Settings:
    decode_tokens: int
    repeats: int
    dtype: str


@dataclass(frozen=True)
class Row:
    """A mode over `repeats` greedy answers of as many tokens, medians; as the repeats differ, so do auto's choices.

    rows: that the model computed behind the prompt. most_rows: of the repeat with the most. seconds: median of the
    ratios to the run without drafts of the same repeat. same: whether all texts were those of "off".
    verdict, depths: of the last repeat.
    """

    mode: str
    tokens: int
    rows: float
    most_rows: int
    steps: float
    drafted: float
    accepted: float
    seconds: float
    ratio: float
    same: bool
    verdict: str
    depths: Sequence[Sequence[int]]

    @property
    def tokens_a_step(self) -> float:
        return (self.tokens - 1) / self.steps


@dataclass(frozen=True)
class Reading:
    """A prompt read with the draft head following, over without: medians of seconds, and of their ratio in pairs."""

    tokens: int
    without: float
    with_drafts: float
    ratio: float


def measure_modes(
    worker: Worker, modes: Sequence[str], tokens: int, repeats: int, progress: Callable[[str], None]
) -> list[Row]:
    """Each mode once a round, in turn; the first is "off"."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    for round in range(repeats):
        for name in in_turn(modes, round):
            progress(f"{tokens} tokens, round {round + 1}: {name}")
            mode, depth = MODES[name]
            runs[name].append(worker.ask(mode=mode, depth=depth, tokens=tokens))
    return [_row(name, found, runs["off"]) for name, found in runs.items()]


def _row(name: str, runs: Sequence[Mapping[str, Any]], off: Sequence[Mapping[str, Any]]) -> Row:
    middle = {key: median(run[key] for run in runs) for key in ("rows", "steps", "drafted", "accepted", "seconds")}
    return Row(
        mode=name,
        tokens=len(runs[-1]["tokens"]),
        most_rows=max(run["rows"] for run in runs),
        ratio=median(run["seconds"] / plain["seconds"] for run, plain in zip(runs, off, strict=True)),
        same=all(run["tokens"] == plain["tokens"] for run, plain in zip(runs, off, strict=True)),
        verdict=runs[-1]["verdict"],
        depths=runs[-1]["depths"],
        **middle,
    )


def measure_reading(worker: Worker, tokens: int, repeats: int, progress: Callable[[str], None]) -> Reading:
    """After a warm-up of both."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for round in range(-1, repeats):
        for drafts in in_turn([0, 1], round):
            progress(f"reading {tokens} tokens, drafts {'on' if drafts else 'off'}")
            found = worker.ask(reading=tokens, drafts=drafts)["seconds"]
            seconds[drafts] += [found] if round >= 0 else []
    ratio = median(after / before for before, after in zip(seconds[0], seconds[1], strict=True))
    return Reading(tokens, median(seconds[0]), median(seconds[1]), ratio)


@dataclass(frozen=True)
class Measured:
    """All that was measured of one checkpoint."""

    machine: Mapping[str, str]
    rows: Sequence[Row]
    reading: Reading
    acceptance: Mapping[str, Any]  # shares: p_1 to p_3; after_norm, before_norm: see acceptance.py
    vain: Sequence[Row]  # of random weights


def measure_mtp(folder: Path, settings: Settings, in_vain: bool, progress: Callable[[str], None]) -> Measured:
    """The checkpoint in `folder`; in_vain: and auto on random weights. InputError where the head cannot be run."""
    try:
        with closing(Worker("mtp", folder, settings.dtype)) as worker:
            environment = worker.environment
            acceptance = worker.ask(acceptance=SEEDS, limit=LIMIT)
            rows = measure_modes(worker, list(MODES), settings.decode_tokens, settings.repeats, progress)
            reading = measure_reading(worker, READING, settings.repeats, progress)
        vain = measure_vain(settings.dtype, progress) if in_vain else []
    except ProgramError as error:
        raise InputError("bench_failed", f"drafting could not be measured: {error}") from error
    return Measured(describe_machine({OURS: environment}), rows, reading, acceptance, vain)


def measure_vain(dtype: str, progress: Callable[[str], None]) -> list[Row]:
    """Auto beside off on random weights."""
    with tempfile.TemporaryDirectory(prefix="mlx_qwen35-bench-") as folder:
        random = write_random_checkpoint(Path(folder), geometry(VAIN), dtype=DTYPES[dtype], vision=False)
        with closing(Worker("mtp", random, dtype)) as worker:
            found = [measure_modes(worker, ["off", "auto"], tokens, 1, progress) for tokens in VAIN_TOKENS]
    return [row for rows in found for row in rows]


# --- report ----------------------------------------------------------------------------------------------------------

_COLUMNS = ("mode", "tokens", "rows", "to off", "steps", "tokens a step", "accepted", "seconds", "time to off", "text")


def format_mtp(
    model: str, config: TextConfig, settings: Settings, found: Measured, expected: Sequence[Expected]
) -> str:
    """The text the command prints. config: of the checkpoint."""
    auto = found.rows[1]
    lines = [
        *header(found.machine),
        f"{'model:':10}{model}, {settings.dtype}; greedy, on past any end; medians of {settings.repeats} rounds of "
        "every mode",
        f"{'':10}in turn; auto knows nothing from former runs",
        "",
        *align(_table(found.rows)),
        "",
        f"auto: {auto.verdict}; depth {_depths(auto.depths)}",
        "rows: that the model computed; time to off: medians of the ratios of a round",
        "",
        *_reading_lines(config, found.reading),
        "",
        *_acceptance_lines(found.acceptance),
    ]
    if found.vain:
        title = f"random weights, whose head guesses nothing ({VAIN} geometry, one round):"
        lines += ["", title, *align(_table(found.vain))]
    if expected:
        lines += ["", *_expected_lines(expected)]
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    plain = {row.tokens: row.rows for row in rows if row.mode == "off"}
    return [_COLUMNS] + [
        (
            row.mode, str(row.tokens), f"{row.rows:g}", f"{row.rows / plain[row.tokens]:.3f}x", f"{row.steps:g}",
            f"{row.tokens_a_step:.2f}", f"{row.accepted:g} of {row.drafted:g}", f"{row.seconds:.2f}",
            f"{row.ratio:.2f}x", "same" if row.same else "DIFFERS",
        )
        for row in rows
    ]  # fmt: skip


def _depths(depths: Sequence[Sequence[int]], most: int = 8) -> str:
    shown = ", ".join(f"{depth} from step {step}" for step, depth in depths[:most])
    return (shown or "0 throughout") + (f", and {len(depths) - most} more changes" if len(depths) > most else "")


def _reading_lines(config: TextConfig, reading: Reading) -> list[str]:
    four = parse_config(geometry("4b")).text
    costs = (reading_cost(config), reading_cost(four), reading_cost(four, joined=True))
    here, small, joined = (f"{share:.1%}" for share in costs)
    return [
        f"reading a prompt of {reading.tokens} tokens: {reading.without:.2f} s without drafts, "
        f"{reading.with_drafts:.2f} s with, ratio {reading.ratio:.3f} (median of pairs)",
        "counted, what drafts add to it: the last layer's MLP for every token, and the head's fc, keys and values: "
        f"{here} of the",
        f"layers' multiply-adds here, {small} of the 4B's, {joined} on a GPU, where queries are of the same product",
    ]


def _acceptance_lines(found: Mapping[str, Any]) -> list[str]:
    shares = ", ".join("-" if share is None else f"{share:.1%}" for share in found["shares"])
    table = [("acceptance at depth 1", "guesses", "greedy", f"coupled, {SEEDS} seeds", "classical")]
    for name, title in (("after_norm", "hidden state after the norm"), ("before_norm", "hidden state before it")):
        own = found[name]
        cells = (f"{own[rule]:.1%}" for rule in ("greedy", "coupled", "classical"))
        table.append((title, str(own["tokens"]), *cells))
    return [
        f"acceptance of draft 1, 2 and 3, each where those before it were accepted, greedy answers: {shares}",
        *align(table),
        "coupled and classical at temperature 1: drawn with the same noise, as here; rejection sampling",
    ]


def _expected_lines(expected: Sequence[Expected]) -> list[str]:
    titles = [f"{name}{depth}" for name in ("tokens ", "M1 Ultra ", "M5 Max ") for depth in DEPTHS]
    table = [("acceptance of the first draft", *titles, "four rows")]
    for row in expected:
        of_max = ["-"] * 3 if row.on_max is None else [f"{gain:.2f}x" for gain in row.on_max]
        cells = [f"{number:.2f}" for number in row.tokens] + [f"{gain:.2f}x" for gain in row.on_ultra] + of_max
        table.append((row.source, *cells, f"{row.implied:.2f}"))
    draft = draft_cost(parse_config(geometry("4b")).text)
    return [
        "expected of Macs: tokens a round, and gain over plain decoding, at depth 1, 2 and 3 (formula in expected.py)",
        *align(table),
        "M1 Ultra: four rows cost 3.2 steps (mlxcel, 27B), two and three by a line between. M5 Max: depth 3 gave 1.71x",
        "(MTPLX, 4B); no verify cost is published: `four rows` is the cost in steps that this implies, and depths 1",
        "and 2 are by a line to it; - where it is below 1, which cannot be. A draft costs "
        f"{draft:.3f} steps (bytes of head and output",
        "matrix in the 4bit recipe of the 4B). Published acceptance is taken for the first draft's, each further one",
        f"being {FALL} times as likely.",
    ]


def write_mtp(path: Path, model: str, settings: Settings, found: Measured, expected: Sequence[Expected]) -> None:
    """Everything that was measured, and what is expected."""
    content = {
        "model": model, "settings": asdict(settings), **asdict(found), "expected": [asdict(row) for row in expected]
    }  # fmt: skip
    write_file(path, json.dumps(content, indent=2) + "\n")
