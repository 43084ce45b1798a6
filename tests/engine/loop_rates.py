"""How often ordinary text is taken for a loop, by kind of file: python tests/engine/loop_rates.py MODEL FOLDER ...

Reads up to --files files of each kind below the folders, with the model's tokenizer, and prints for several thresholds
(least tokens that repeat, least times) how many files are taken for loops, and which at the thresholds in use.
"""

import argparse
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from mlx_qwen35.engine.constraints.loop import LEAST, LONGEST, TIMES
from mlx_qwen35.prompt.tokenizer import load_tokenizer

KINDS = (".py", ".md", ".txt", ".rst", ".csv", ".json", ".c", ".h", ".html", ".js")
GRID = [(least, times) for least in (64, 128, 256, 384) for times in (3, 4, 6, 8)]
CHARS, TOKENS = 60_000, 12_000  # of a file


def longest_runs(tokens: np.ndarray) -> np.ndarray:
    """(LONGEST,) by period: how many tokens in a row equal the one a period before, at most."""
    runs = np.zeros(LONGEST, int)
    for period in range(1, min(LONGEST + 1, len(tokens))):
        equal = tokens[period:] == tokens[:-period]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], equal.view(np.int8), [0]])))
        runs[period - 1] = max(edges[1::2] - edges[::2], default=0)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--files", type=int, default=300)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    found = defaultdict(list)
    for folder in args.folders:
        for file in sorted(folder.rglob("*")):
            if file.suffix in KINDS and file.is_file():
                found[file.suffix].append(file)
    looping, read, tokens, named = Counter(), Counter(), 0, []
    for kind, files in found.items():
        for file in random.Random(1).sample(files, min(args.files, len(files))):
            text = file.read_text(encoding="utf-8", errors="replace")[:CHARS]
            ids = np.array(tokenizer.encode(text)[:TOKENS])
            read[kind], tokens, runs = read[kind] + 1, tokens + len(ids), longest_runs(ids)
            for least, times in [*GRID, (LEAST, TIMES)]:
                if (runs >= np.maximum(least, times * np.arange(1, LONGEST + 1))).any():
                    looping[least, times] += 1
                    named += [file] * ((least, times) == (LEAST, TIMES))
    print(f"{sum(read.values()):,} files, {tokens:,} tokens: {dict(read)}")
    for least, times in GRID:
        print(f"at least {least} tokens, {times} times: {looping[least, times]} files")
    print(f"in use ({LEAST}, {TIMES}):", *(sorted(set(named)) or ["none"]))


if __name__ == "__main__":
    main()
