"""Loading a session beside reading its tokens again: python tests/engine/session_seconds.py [TOKENS].

Random weights of the geometry mid, in float32. Prints hardware, versions, seconds of the process on its CPUs and on the
clock, and memory.
"""

import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.session_arrays import read_places, session_arrays
from mlx_qwen35.cache.session_file import SessionFile
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.load import load_model
from mlx_qwen35.machine.chip import brand


def timed(what: str, work: Callable[[], Any]) -> Any:
    mx.reset_peak_memory()
    before, cpu, clock = mx.get_active_memory(), time.process_time(), time.perf_counter()
    found = work()
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    held, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    memory = f"{peak / 1e6:8.1f} MB at most, {held / 1e6:.1f} MB kept"
    print(f"{what:12} {cpu:8.2f} s of CPU {clock:8.2f} s {memory}", flush=True)
    return found


def main(tokens: int) -> None:
    versions = f"Python {platform.python_version()}, MLX {version('mlx')}"
    print(f"{brand()}, {platform.platform()}, {versions}; {tokens:,} tokens", flush=True)
    with TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_random_checkpoint(Path(folder) / "mid", geometry("mid"), vision=False))
        model = load_model(checkpoint, mx.float32, "mid")
        row = PromptRow(np.random.default_rng(0).integers(0, model.config.vocab_size, tokens).tolist())
        cache = model.make_cache()
        timed("reading", lambda: prefill(model, cache, row, 512))
        file = SessionFile(Path(folder) / "session")
        nbytes = timed("saving", lambda: file.write({}, session_arrays([cache], model.make_cache())))
        (loaded,), _ = timed("loading", lambda: read_places(file.arrays(), model.make_cache(), [cache.position]))
        same = all(mx.array_equal(array, loaded.arrays()[name]).item() for name, array in cache.arrays().items())
        print(f"{nbytes / 1e6:.1f} MB, from the system's page cache; the same numbers: {same}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
