"""The command: mlx_qwen35.bench --model FOLDER_OR_ID | --geometry mid [--compare mlx-lm,mlx-vlm,transformers]"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import mlx.core as mx

from mlx_qwen35.bench.measure import OURS, PEERS, Settings, measure, started, summarize
from mlx_qwen35.bench.report import describe_machine, draw, format_table, write_json
from mlx_qwen35.checkpoint import open_checkpoint
from mlx_qwen35.commands import clean_errors
from mlx_qwen35.errors import InputError
from mlx_qwen35.hub import resolve
from mlx_qwen35.load import DTYPES, choose_dtype
from mlx_qwen35.random_checkpoint import GEOMETRIES, geometry, write_random_checkpoint


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"must name some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_qwen35.bench",
        description="Measure prefill and decode speed on this machine, beside other programs on the same weights. Each "
        "runs in a process of its own, all in turn. Ends with status 1 if one that was asked for could not run.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="local folder, Hugging Face id, or nano")
    source.add_argument("--geometry", choices=GEOMETRIES, help="random weights of this size, removed afterwards")
    parser.add_argument("--revision", help="branch, tag or commit of the Hugging Face id")
    parser.add_argument("--prompt-lengths", type=_lengths, default=(128, 1024), help="default 128,1024")
    parser.add_argument("--decode-tokens", type=_positive, default=32, help="tokens timed after the first; default 32")
    parser.add_argument("--repeats", type=_positive, default=5, help="rounds, each program once in each; default 5")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on the CPU, else the checkpoint's")
    parser.add_argument("--prefill-step-size", type=_positive, default=1024, help="prompt tokens a pass; default 1024")
    parser.add_argument("--compare", type=_peers, default=(), help=f"some of {','.join(PEERS)}")
    parser.add_argument("--json", type=Path, help="file for every run and the medians")
    parser.add_argument("--plot", type=Path, help="PNG file for the speeds over the prompt lengths; needs matplotlib")
    return parser


@contextmanager
def _checkpoint(options: argparse.Namespace) -> Iterator[Path]:
    """The folder to measure: the model's, or a temporary one with random weights."""
    if options.model:
        yield resolve(options.model, options.revision)
        return
    dtype = options.dtype or ("float32" if mx.default_device() == mx.cpu else "bfloat16")
    with tempfile.TemporaryDirectory(prefix="mlx_qwen35-bench-") as folder:
        yield write_random_checkpoint(Path(folder), geometry(options.geometry), dtype=DTYPES[dtype], mtp=False)


def _check_outputs(options: argparse.Namespace) -> None:
    """What would fail after all the measuring, found before it."""
    if options.plot and find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is not installed: pip install 'mlx-qwen35[plot]'")
    for path in (options.json, options.plot):
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"the folder of {path} must exist")
        if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise InputError(f"{path} must be a file that can be written")
    if options.revision and options.geometry:
        raise InputError("--revision is for a Hugging Face id given with --model; with --geometry it has no effect")


def bench(options: argparse.Namespace) -> dict[str, str]:
    """Measure, print, write, and return the programs that could not run, each with the reason."""
    _check_outputs(options)
    failures: dict[str, str] = {}
    with _checkpoint(options) as folder:
        dtype = str(choose_dtype(open_checkpoint(folder), options.dtype)).removeprefix("mlx.core.")
        settings = Settings(
            options.prompt_lengths, options.decode_tokens, options.repeats, options.prefill_step_size, dtype
        )
        with started((OURS, *options.compare), folder, dtype, failures) as workers:
            if OURS in failures:
                raise InputError(f"{OURS} could not load {options.model or options.geometry}: {failures[OURS]}")
            runs = measure(workers, settings, failures, _progress)
            environments = {worker.name: worker.environment for worker in workers}
    if OURS in failures:
        raise InputError(f"{OURS} could not run: {failures[OURS]}")
    machine, rows = describe_machine(environments), summarize(runs)
    model = options.model or f"random weights of geometry {options.geometry}"
    print(format_table(machine, model, settings, rows, median(run.products for run in runs)))
    if options.json:
        write_json(options.json, machine, model, settings, rows, runs, failures)
    if options.plot:
        draw(options.plot, f"{model}, {dtype}\n{machine['chip']}", rows)
    return failures


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with clean_errors("mlx_qwen35.bench"):
        failures = bench(options)
    if failures:
        sys.exit("\n".join(f"error: {name} could not run: {reason}" for name, reason in failures.items()))


if __name__ == "__main__":
    main()
