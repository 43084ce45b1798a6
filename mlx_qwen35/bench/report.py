"""The measurements as a table, as JSON and as a plot, and the machine."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from mlx_qwen35.backend import backend, system_memory
from mlx_qwen35.bench.measure import OURS, Settings, Summary
from mlx_qwen35.bench.scatter import NOT_MEASURABLE, notes, with_scatter
from mlx_qwen35.console.table import align
from mlx_qwen35.machine.chip import brand

_PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "transformers", "torch")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_COLUMNS = (
    "program", "prompt", "prefill tok/s", "decode tok/s", "beyond products", "MLX peak", "max RSS",
    "ours: prefill", "decode", "beyond",
)  # fmt: skip


def describe_machine(environments: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Hardware, systems and versions. environments: program -> its worker's first reply."""
    memory, on = system_memory(), backend().device
    gpu = "none used" if on == "the CPU" else f"{on}, {backend().usable_memory() / 1e9:.1f} GB"
    threads = [f"{name}={os.environ[name]}" for name in _THREADS if name in os.environ]
    threads += [f"torch {e['torch_threads']}" for e in environments.values() if e["torch_threads"]]
    return {
        "chip": f"{brand()}, {os.cpu_count()} cores, {memory / 1e9:.1f} GB memory",
        "GPU": gpu,
        "system": platform.platform(),
        "threads": ", ".join(threads) or "as the libraries choose",
        "BLAS": _blas(environments[OURS]["blas"]),
        "versions": ", ".join([f"Python {platform.python_version()}", *map(_version, _PACKAGES)]),
    }


def _blas(found: Mapping[str, Sequence[str]]) -> str:
    """Which BLAS our worker had in memory, and what came, or should have come, by LD_PRELOAD."""
    text = ", ".join(found["loaded"]) or "of the system"
    text += f"; preloaded: {', '.join(found['preloaded']) or 'none'}"
    return text + (f"; NOT FOUND, so not preloaded: {', '.join(found['not_found'])}" if found["not_found"] else "")


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} not installed"


def header(machine: Mapping[str, str]) -> list[str]:
    return [f"{name + ':':10}{value}" for name, value in machine.items()]


def format_table(
    machine: Mapping[str, str], model: str, settings: Settings, rows: Sequence[Summary], products: float
) -> str:
    """The text the command prints. products: seconds of the bare products of one token."""
    table = align([_COLUMNS] + [_cells(row) for row in rows])
    shares = {
        f"{what} of {row.program} at {row.prompt:,} tokens": share
        for row in rows
        for what, share in (("prefill", row.prefill_scatter), ("decode", row.decode_scatter))
    }
    lines = [
        *header(machine),
        f"{'model:':10}{model}, {settings.dtype}; {settings.repeats} rounds of every program in turn, "
        f"{settings.decode_tokens} tokens decoded, prefill of {settings.prefill_step_size} tokens at a time",
        f"{'products:':10}{products * 1e3:.2f} ms a token for the matrix-vector products of the linear maps alone",
        "",
        *table,
        "",
        "medians over rounds; ~: from the slowest round to the fastest, of the median",
        "ours: our speed over the program's, our time over its time beyond the products, round by round",
        *notes(table, shares, "in some round a token took no longer than its products, which are timed right after it"),
    ]
    return "\n".join(lines)


def _cells(row: Summary) -> tuple[str, ...]:
    peak = "-" if row.mlx_peak_bytes is None else f"{row.mlx_peak_bytes / 1e9:.2f} GB"
    speeds = (
        with_scatter(f"{row.prefill_speed:.1f}", row.prefill_scatter),
        with_scatter(f"{row.decode_speed:.1f}", row.decode_scatter),
        f"{row.beyond * 1e3:.2f} ms" if row.beyond else NOT_MEASURABLE,
    )  # fmt: skip
    ratios = tuple(map(ratio, (row.ours_prefill, row.ours_decode, row.ours_beyond)))
    ratios = ("", "", "") if row.program == OURS else ratios
    return (row.program, str(row.prompt), *speeds, peak, f"{row.max_rss_bytes / 1e9:.2f} GB", *ratios)


def ratio(value: float | None) -> str:
    return f"{value:.2f}x" if value else NOT_MEASURABLE


def as_json(
    machine: Mapping[str, str],
    model: str,
    settings: Any,
    rows: Sequence[Any],
    runs: Sequence[Any],
    failures: Mapping[str, str],
) -> dict[str, Any]:
    """Every measurement, and the medians with their ranges. settings, rows, runs: dataclasses."""
    return {
        "machine": dict(machine), "model": model, "settings": asdict(settings), "failures": dict(failures),
        "rows": [asdict(row) for row in rows], "runs": [asdict(run) for run in runs],
    }  # fmt: skip
