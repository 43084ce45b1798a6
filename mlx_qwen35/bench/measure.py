"""Programs in worker processes, measured in turn."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from mlx_qwen35.bench.scatter import positive_median, ratios, scatter

OURS = "mlx_qwen35"
PEERS = ("mlx-lm", "mlx-vlm", "transformers")
Options = Mapping[str, Mapping[str, Any]]  # program -> options of its loader
NO_OPTIONS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Beside:
    """An adapter that is loaded beside the weights."""

    name: str
    path: Path
    scale: float

    @property
    def described(self) -> str:
        return self.name if self.scale == 1 else f"{self.name}, scale {self.scale:g}"


class ProgramError(Exception):
    """A program that could not be loaded or run; the message is the reason."""

    def __init__(self, program: str, reason: str):
        super().__init__(reason)
        self.program = program


def last_words(errors: TextIO, code: int) -> str:
    """Why a process ended, from what it wrote to standard error."""
    errors.seek(0)
    said = [text.strip() for text in errors if text.strip()]
    return f"{said[-1] if said else 'it said nothing'} (ended with code {code})"


class Worker:
    """One program in a process of its own, until `close`."""

    def __init__(self, name: str, folder: Path, dtype: str, options: Mapping[str, Any] = NO_OPTIONS):
        """Raises ProgramError when the program is not installed or cannot load the checkpoint.

        options: of its loader, see worker.py.
        """
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the worker)
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), name, str(folder), dtype]
        command += [json.dumps(options)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1
        )
        self.environment = self._reply()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises ProgramError when the process ends instead."""
        with suppress(BrokenPipeError):  # if the process has ended, the reply says why
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        reason = last_words(self._errors, self._process.wait())
        self.close()
        raise ProgramError(self.name, reason)

    def close(self) -> None:
        """End the process. Closing twice is fine."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextmanager
def started(
    names: Sequence[str], folder: Path, dtype: str, failures: dict[str, str], options: Options = NO_OPTIONS
) -> Iterator[list[Worker]]:
    """A worker for each program that loads. The others go to `failures` with the reason. options: of their loaders."""
    workers: list[Worker] = []
    try:
        for name in names:
            try:
                workers.append(Worker(name, folder, dtype, options.get(name, {})))
            except ProgramError as error:
                failures[error.program] = str(error)
        yield workers
    finally:
        for worker in workers:
            worker.close()


@dataclass(frozen=True)
class Measurement:
    """One program in one round. Times are in seconds."""

    program: str
    prompt: int
    round: int
    prefill: float  # for the whole prompt and its next token
    token: float  # median over the decoded tokens
    products: float  # median time of the matrix products alone, right after it
    mlx_peak_bytes: int | None
    max_rss_bytes: int  # the process's, so far

    @property
    def prefill_speed(self) -> float:
        return self.prompt / self.prefill

    @property
    def decode_speed(self) -> float:
        return 1 / self.token

    @property
    def beyond(self) -> float:
        """Time of a token beyond its matrix products, which are timed apart: not positive where rounds scatter."""
        return self.token - self.products


@dataclass(frozen=True)
class Settings:
    prompt_lengths: tuple[int, ...]
    decode_tokens: int
    repeats: int
    prefill_step_size: int
    dtype: str


def in_turn(names: Sequence[str], round: int) -> list[str]:
    """The order of a round: as given in even rounds, reversed in odd ones, so that drift favours none."""
    return list(names) if round % 2 == 0 else list(reversed(names))


def measure(
    workers: Sequence[Worker], settings: Settings, failures: dict[str, str], progress: Callable[[str], None]
) -> list[Measurement]:
    """For each prompt length a warm-up of every program, then `repeats` rounds in which each runs once.

    The matrix products alone are timed after each run, as often as it decoded tokens. A program that fails goes to
    `failures` without its runs. The others go on, unless ours has failed.
    """
    by_name = {worker.name: worker for worker in workers}
    runs: list[Measurement] = []
    for prompt in settings.prompt_lengths:
        for round in range(-1, settings.repeats):
            for name in in_turn([name for name in by_name if name not in failures], round):
                progress(f"{prompt} tokens, {'warm-up' if round < 0 else f'round {round + 1}'}: {name}")
                try:
                    run = _run(by_name[name], by_name[OURS], prompt, round, settings)
                except ProgramError as error:
                    failures[error.program] = str(error)
                    if OURS in failures:
                        return []
                else:
                    runs += [run] if round >= 0 else []
    return [run for run in runs if run.program not in failures]


def _run(worker: Worker, ours: Worker, prompt: int, round: int, settings: Settings) -> Measurement:
    decode = settings.decode_tokens if round >= 0 else 2
    reply = worker.ask(prompt=prompt, decode=decode, step=settings.prefill_step_size)
    products = median(ours.ask(products=decode)["products_s"])
    peak, rss = reply["mlx_peak_bytes"], reply["max_rss_bytes"]
    return Measurement(worker.name, prompt, round, reply["prefill_s"], median(reply["decode_s"]), products, peak, rss)


@dataclass(frozen=True)
class Summary:
    """One program at one prompt length: medians over its rounds, and our ratios to it, round by round.

    Differences, and ratios of them, are None where they are not measurable: where one of a round is not positive.
    """

    program: str
    prompt: int
    prefill_speed: float  # tokens per second
    prefill_range: tuple[float, float]  # of its rounds, the slowest and the fastest
    prefill_scatter: float  # from one to the other, in medians
    decode_speed: float
    decode_range: tuple[float, float]
    decode_scatter: float
    beyond: float | None  # seconds a token beyond its matrix products
    mlx_peak_bytes: int | None
    max_rss_bytes: int
    ours_prefill: float | None  # our speed over its: above 1 we are faster
    ours_decode: float | None
    ours_beyond: float | None  # our time over its: below 1 we lose less


def summarize(runs: Sequence[Measurement]) -> list[Summary]:
    """The summary of each program and prompt length; ratios are medians over pairs of one round."""
    return [
        _summary(
            [run for run in runs if (run.prompt, run.program) == (prompt, name)],
            [run for run in runs if (run.prompt, run.program) == (prompt, OURS)],
        )
        for prompt, name in dict.fromkeys((run.prompt, run.program) for run in runs)
    ]


def _summary(own: Sequence[Measurement], ours: Sequence[Measurement]) -> Summary:
    def of(name: str, rounds: Sequence[Measurement] = own) -> list[float]:
        return [getattr(run, name) for run in rounds]

    prefill, decode = of("prefill_speed"), of("decode_speed")
    peaks = [run.mlx_peak_bytes for run in own if run.mlx_peak_bytes is not None]
    return Summary(
        program=own[0].program,
        prompt=own[0].prompt,
        prefill_speed=median(prefill),
        prefill_range=(min(prefill), max(prefill)),
        prefill_scatter=scatter(prefill),
        decode_speed=median(decode),
        decode_range=(min(decode), max(decode)),
        decode_scatter=scatter(decode),
        beyond=positive_median(of("beyond")),
        mlx_peak_bytes=max(peaks, default=None),
        max_rss_bytes=max(run.max_rss_bytes for run in own),
        ours_prefill=ratios(of("prefill_speed", ours), prefill),
        ours_decode=ratios(of("decode_speed", ours), decode),
        ours_beyond=ratios(of("beyond", ours), of("beyond")),
    )
