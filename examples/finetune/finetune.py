"""Teaches nano three animals in pictures, in minutes on a CPU, and counts right answers before and after.

    python examples/finetune/finetune.py [FOLDER] [--steps N]

FOLDER (default: finetune-animals) gets data/, see animals.py, and adapter/ with the adapter and its report. The data of
the count are test.jsonl, which is not trained on, and questions of nano's other tasks.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from animals import SHAPES, UNSEEN, write

from mlx_qwen35 import Model, Processor, batch_generate, load

STEPS = 200
OPTIONS = ("--rank", "8", "--learning-rate", "3e-3", "--batch-size", "8", "--accumulate", "1", "--draft-head")
SUMS = [(a, b) for a in (12, 35, 47, 68) for b in (19, 23, 30, 54, 71)]  # a task that the rows do not have
GREEDY = {"temp": 0, "max_tokens": 24, "mtp": "off", "enable_thinking": False}


def answered(model: Model, processor: Processor, data: Path) -> dict[str, tuple[int, int]]:
    """How many answers are right, word for word, of how many, by kind of question."""
    prompts, right, kinds = [], [], []
    for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines():
        asked, answer = json.loads(line)["messages"]
        image, text = asked["content"]
        shown = {"type": "image", "image": str(data / image["image"])}
        prompts.append([{"role": "user", "content": [shown, text]}])
        right.append(answer["content"])
        kinds.append(kind(answer["content"]))
    for a, b in SUMS:
        prompts.append([{"role": "user", "content": f"What is {a} + {b}?"}])
        right.append(str(a + b))
        kinds.append("sums of two numbers")
    counts: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(prompts), 16):
        rows = slice(start, start + 16)
        for result, wanted, own in zip(
            batch_generate(model, processor, prompts[rows], **GREEDY), right[rows], kinds[rows], strict=True
        ):
            counts[own].append(result.text.strip() == wanted)
    return {own: (sum(found), len(found)) for own, found in counts.items()}


def kind(answer: str) -> str:
    _, colour, thing = answer.removesuffix(".").split()
    if thing in SHAPES:
        return "shapes, known before"
    return "animals, colour never shown" if (thing, colour) in UNSEEN else "animals"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("finetune-animals"))
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    data, adapter = args.folder / "data", args.folder / "adapter"
    write(data)
    before = answered(*load("nano"), data)
    command = ["--model", "nano", "--data", str(data), "--adapter", str(adapter), "--steps", str(args.steps), *OPTIONS]
    print("mlx_qwen35.train", *command, flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "mlx_qwen35.train", *command], check=True)
    print(f"trained in {time.monotonic() - began:.0f} s\n")
    after = answered(*load("nano", adapter=adapter), data)
    print(f"{'right answers of':28}  before  after")
    for name, (right, asked) in after.items():
        print(f"{f'{asked} {name}':28}  {before[name][0]:6}  {right:5}")


if __name__ == "__main__":
    main()
