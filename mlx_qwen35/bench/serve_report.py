"""What servers were measured to do, as tables."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mlx_qwen35.bench.measure import OURS
from mlx_qwen35.bench.report import header, ratio
from mlx_qwen35.bench.scatter import NOT_MEASURABLE, notes, ratios, scatter, with_scatter
from mlx_qwen35.bench.serve import Run, Settings
from mlx_qwen35.console.table import align

_LOAD = ("server", "clients", "requests/s", "tokens/s", "first token", "p95", "ours: requests/s", "first token")
_SESSION = ("server", "session", "tokens of prompts", "read", "first token", "p95", "ours: session", "read")


@dataclass(frozen=True)
class Summary:
    """One server with so many clients, or its session where clients is 0. Ratios are medians over pairs of a round.

    Ratios are None where they are not measurable: where a server says that it read nothing.
    """

    program: str
    clients: int
    requests: int
    tokens: int
    requests_per_second: float  # this, the tokens a second and the seconds: medians over rounds
    requests_range: tuple[float, float]  # of the rounds, the slowest and the fastest
    scatter: float  # from one to the other, in medians
    tokens_per_second: float
    seconds: float
    first: float  # seconds until a request's first text: the median
    first_p95: float
    prompt_tokens: int
    tokens_read: int  # of the prompts, without what was kept from earlier ones
    ours_requests: float | None  # our requests a second over its: above 1 we are faster
    ours_first: float | None  # our time over its: below 1 we are faster
    ours_seconds: float | None
    ours_read: float | None  # below 1 we read less


def summarize(runs: Sequence[Run]) -> list[Summary]:
    def of(program: str, clients: int) -> list[Run]:
        return [run for run in runs if (run.program, run.clients) == (program, clients)]

    return [
        _summary(program, clients, of(program, clients), of(OURS, clients))
        for clients, program in dict.fromkeys((run.clients, run.program) for run in runs)
    ]


def _summary(program: str, clients: int, own: Sequence[Run], ours: Sequence[Run]) -> Summary:
    firsts, rates = sorted(_firsts(own)), [run.requests_per_second for run in own]
    return Summary(
        program=program,
        clients=clients,
        requests=len(firsts),
        tokens=sum(run.tokens for run in own),
        requests_per_second=median(rates),
        requests_range=(min(rates), max(rates)),
        scatter=scatter(rates),
        tokens_per_second=median(run.tokens / run.seconds for run in own),
        seconds=median(run.seconds for run in own),
        first=median(firsts),
        first_p95=firsts[math.ceil(0.95 * len(firsts)) - 1],
        prompt_tokens=sum(reply.prompt_tokens for run in own for reply in run.replies),
        tokens_read=sum(run.tokens_read for run in own),
        ours_requests=ratios([run.requests_per_second for run in ours], rates),
        ours_first=ratios(*([median(_firsts([run])) for run in runs] for runs in (ours, own))),
        ours_seconds=ratios(*([run.seconds for run in runs] for runs in (ours, own))),
        ours_read=ratios(*([run.tokens_read for run in runs] for runs in (ours, own))),
    )


def _firsts(runs: Sequence[Run]) -> Iterator[float]:
    return (reply.first for run in runs for reply in run.replies)


def format_tables(machine: Mapping[str, str], model: str, settings: Settings, rows: Sequence[Summary]) -> str:
    """The text the command prints."""
    load, session = ([row for row in rows if bool(row.clients) is many] for many in (True, False))
    at_once = align([_LOAD] + [_load_cells(row) for row in load])
    in_turns = align([_SESSION] + [_session_cells(row) for row in session])
    shares = {f"{f'{row.clients} clients' if row.clients else 'session'}, {row.program}": row.scatter for row in rows}
    return "\n".join([
        *header(machine),
        f"{'model:':10}{model}, {settings.dtype}; {settings.repeats} rounds of every server in turn, each client "
        f"{settings.requests} times {settings.prompt_tokens} tokens of prompt and {settings.answer_tokens} of answer",
        "",
        *at_once,
        "",
        f"a session of {settings.turns} turns, each with {settings.prompt_tokens} new tokens and all before them",
        "",
        *in_turns,
        "",
        "medians over rounds; ~: from the slowest round to the fastest, of the median",
        "ours: our requests a second over the server's, our time and tokens over its, round by round",
        *notes([*at_once, *in_turns], shares, "a server says that it read no token of a round's prompts"),
    ])  # fmt: skip


def _ratios(row: Summary, *values: float | None) -> tuple[str, ...]:
    return tuple("" if row.program == OURS else ratio(value) for value in values)


def _load_cells(row: Summary) -> tuple[str, ...]:
    speeds = (with_scatter(f"{row.requests_per_second:.2f}", row.scatter), f"{row.tokens_per_second:.1f}")
    firsts = (f"{row.first:.2f} s", f"{row.first_p95:.2f} s")
    return (row.program, str(row.clients), *speeds, *firsts, *_ratios(row, row.ours_requests, row.ours_first))


def _session_cells(row: Summary) -> tuple[str, ...]:
    read = f"{row.tokens_read:,}" if row.ours_read else NOT_MEASURABLE
    firsts = (f"{row.first:.2f} s", f"{row.first_p95:.2f} s")
    seconds = with_scatter(f"{row.seconds:.2f} s", row.scatter)
    compared = _ratios(row, row.ours_seconds, row.ours_read)
    return (row.program, seconds, f"{row.prompt_tokens:,}", read, *firsts, *compared)
