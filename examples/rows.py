"""Decode several prompts together, beside mlx-lm's batch generator: tokens per second and peak memory in one run.

    python examples/rows.py FOLDER --lengths 500 8000 --rows 1 2 4 8

Each program runs in a process of its own, one after the other, on the same random prompts of the lengths, taken in turn
by the rows. It is timed from the last prompt's first token on. Decoding is greedy, without drafts, and does not stop.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

STEP = 512  # prompt tokens of a prefill chunk


def prompts(rows: int, lengths: list[int], vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, lengths[row % len(lengths)]).tolist() for row in range(rows)]


def run_ours(folder: str, rows: int, lengths: list[int], decode: int) -> tuple[float, float, int]:
    from mlx_qwen35 import load
    from mlx_qwen35.engine.engine import Engine
    from mlx_qwen35.engine.presets import Sampling
    from mlx_qwen35.engine.sampling import Sampler
    from mlx_qwen35.engine.sequence import Sequence
    from mlx_qwen35.prompt.prompt import Prompt

    model, processor = load(folder)
    weights = mx.get_active_memory()
    given = prompts(rows, lengths, processor.vocabulary)
    engine = Engine(model)
    mx.reset_peak_memory()
    begin = time.perf_counter()
    for tokens in given:
        sampler = Sampler(Sampling(temp=0), 0, len(tokens), processor.vocabulary)
        engine.add(Sequence(Prompt(tuple(tokens), False), sampler, decode, prefill_step_size=STEP))
    while engine.waiting:
        engine.step()
    prefilled = time.perf_counter()
    while not engine.idle:
        engine.step()
    return prefilled - begin, time.perf_counter() - prefilled, mx.get_peak_memory() - weights


def run_mlx_lm(folder: str, rows: int, lengths: list[int], decode: int) -> tuple[float, float, int]:
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import load_model

    model, config = load_model(Path(folder))
    if mx.default_device() == mx.cpu:  # whose 16-bit types are slow; ours loads float32 there, too
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    weights = mx.get_active_memory()
    given = prompts(rows, lengths, config.get("text_config", config)["vocab_size"])
    generator = BatchGenerator(model, max_tokens=decode, prefill_step_size=STEP, completion_batch_size=rows)
    mx.reset_peak_memory()
    begin, prefilled, ended, begun = time.perf_counter(), 0.0, 0, set()
    generator.insert(given)
    while ended < rows:
        for response in generator.next_generated():
            begun.add(response.uid)
            ended += response.finish_reason is not None
        if len(begun) == rows and not prefilled:
            prefilled = time.perf_counter()
    return prefilled - begin, time.perf_counter() - prefilled, mx.get_peak_memory() - weights


PROGRAMS = {"mlx_qwen35": run_ours, "mlx-lm": run_mlx_lm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 400], help="of the prompts, in turn")
    parser.add_argument("--decode", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(PROGRAMS[args.one](args.model, args.rows[0], args.lengths, args.decode)))
        return
    if args.model == "nano":
        from mlx_qwen35.checkpoint.hub import resolve

        args.model = str(resolve("nano"))
    on = mx.device_info(mx.default_device().type).get("device_name", platform.machine())
    print(f"MLX {mx.__version__}, {on}, {platform.system()}; prompts of {args.lengths} tokens, {args.decode} decoded")
    print(f"{'rows':>4}  {'program':12} {'prefill s':>9} {'tokens/s':>9} {'peak MB above the weights':>26}")
    for rows in args.rows:
        for name in args.programs:
            given = ["--rows", str(rows), "--lengths", *map(str, args.lengths), "--decode", str(args.decode)]
            command = [sys.executable, __file__, args.model, *given, "--one", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{rows:4}  {name:12} {done.stderr.strip().splitlines()[-1][:90]}")
                continue
            prefill, decoding, peak = json.loads(done.stdout.splitlines()[-1])
            speed = rows * (args.decode - 1) / decoding
            print(f"{rows:4}  {name:12} {prefill:9.2f} {speed:9.1f} {peak / 1e6:26.1f}", flush=True)


if __name__ == "__main__":
    main()
