"""What servers were measured to do, as tables and as JSON."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from mlx_qwen35.bench.measure import OURS
from mlx_qwen35.bench.report import header
from mlx_qwen35.bench.serve import Run, Settings
from mlx_qwen35.console.streams import write_file
from mlx_qwen35.console.table import align

_LOAD = ("server", "clients", "requests/s", "tokens/s", "first token", "p95", "ours: requests/s", "first token")
_SESSION = ("server", "session", "tokens of prompts", "read", "first token", "p95", "ours: session", "read")


@dataclass(frozen=True)
class Summary:
    """One server with so many clients, or its session where clients is 0. Ratios are medians over pairs of a round."""

    program: str
    clients: int
    requests: int
    tokens: int
    requests_per_second: float  # this and the next two: medians over rounds
    tokens_per_second: float
    seconds: float
    first: float  # seconds until a request's first text: the median
    first_p95: float
    prompt_tokens: int
    tokens_read: int  # of the prompts, without what was kept from earlier ones
    ours_requests: float  # our requests a second over its: above 1 we are faster
    ours_first: float  # our time over its: below 1 we are faster
    ours_seconds: float
    ours_read: float  # below 1 we read less


def summarize(runs: Sequence[Run]) -> list[Summary]:
    def of(program: str, clients: int) -> list[Run]:
        return [run for run in runs if (run.program, run.clients) == (program, clients)]

    return [
        _summary(program, clients, of(program, clients), of(OURS, clients))
        for clients, program in dict.fromkeys((run.clients, run.program) for run in runs)
    ]


def _summary(program: str, clients: int, own: Sequence[Run], ours: Sequence[Run]) -> Summary:
    pairs = list(zip(ours, own, strict=True))
    firsts = sorted(_firsts(own))
    return Summary(
        program=program,
        clients=clients,
        requests=len(firsts),
        tokens=sum(run.tokens for run in own),
        requests_per_second=median(run.requests_per_second for run in own),
        tokens_per_second=median(run.tokens / run.seconds for run in own),
        seconds=median(run.seconds for run in own),
        first=median(firsts),
        first_p95=firsts[math.ceil(0.95 * len(firsts)) - 1],
        prompt_tokens=sum(reply.prompt_tokens for run in own for reply in run.replies),
        tokens_read=sum(run.tokens_read for run in own),
        ours_requests=median(us.requests_per_second / it.requests_per_second for us, it in pairs),
        ours_first=median(median(_firsts([us])) / median(_firsts([it])) for us, it in pairs),
        ours_seconds=median(us.seconds / it.seconds for us, it in pairs),
        ours_read=median(us.tokens_read / it.tokens_read for us, it in pairs),
    )


def _firsts(runs: Sequence[Run]) -> Iterator[float]:
    return (reply.first for run in runs for reply in run.replies)


def format_tables(machine: Mapping[str, str], model: str, settings: Settings, rows: Sequence[Summary]) -> str:
    """The text the command prints."""
    load, session = ([row for row in rows if bool(row.clients) is many] for many in (True, False))
    return "\n".join([
        *header(machine),
        f"{'model:':10}{model}, {settings.dtype}; {settings.repeats} rounds of every server in turn, each client "
        f"{settings.requests} times {settings.prompt_tokens} tokens of prompt and {settings.answer_tokens} of answer",
        "",
        *align([_LOAD] + [_load_cells(row) for row in load]),
        "",
        f"a session of {settings.turns} turns, each with {settings.prompt_tokens} new tokens and all before them",
        "",
        *align([_SESSION] + [_session_cells(row) for row in session]),
        "",
        "ours: our requests a second over the server's, our time and tokens over its; medians over rounds",
    ])  # fmt: skip


def _ratios(row: Summary, *ratios: float) -> tuple[str, ...]:
    return tuple("" if row.program == OURS else f"{ratio:.2f}x" for ratio in ratios)


def _load_cells(row: Summary) -> tuple[str, ...]:
    speeds = (f"{row.requests_per_second:.2f}", f"{row.tokens_per_second:.1f}")
    firsts = (f"{row.first:.2f} s", f"{row.first_p95:.2f} s")
    return (row.program, str(row.clients), *speeds, *firsts, *_ratios(row, row.ours_requests, row.ours_first))


def _session_cells(row: Summary) -> tuple[str, ...]:
    read = (f"{row.prompt_tokens:,}", f"{row.tokens_read:,}", f"{row.first:.2f} s", f"{row.first_p95:.2f} s")
    return (row.program, f"{row.seconds:.2f} s", *read, *_ratios(row, row.ours_seconds, row.ours_read))


def write_json(
    path: Path,
    machine: Mapping[str, str],
    model: str,
    settings: Settings,
    rows: Sequence[Summary],
    runs: Sequence[Run],
    failures: Mapping[str, str],
) -> None:
    """Every reply, and the medians."""
    content = {
        "machine": dict(machine), "model": model, "settings": asdict(settings), "failures": dict(failures),
        "rows": [asdict(row) for row in rows], "runs": [asdict(run) for run in runs],
    }  # fmt: skip
    write_file(path, json.dumps(content, indent=2) + "\n")
