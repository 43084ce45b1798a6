"""Measures how many of the draft head's tokens are accepted on nano's tasks, and prints two markdown tables.

    python examples/nano/acceptance.py [--items N] [--json FILE]

Every held-out item is answered without drafts and with them at depths 1, 2 and 3, greedily and at temperature 1 with
a seed of its own; half of them thinking. A step is a pass of the model behind the prompt. Acceptance of draft j counts
those whose predecessors were accepted. `coupled` and `classical` are expectations at temperature 1 over the greedy
answers, see guesses.py. Two tasks run at a time. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from guesses import Answer, Text, acceptance, answer, shares
from ours import prompt
from tasks import ALL_TASKS, items_of

import mlx_qwen35
from mlx_qwen35 import Model
from mlx_qwen35.engine.media import encode_media
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.model.model import Visual
from mlx_qwen35.prompt.positions import positions
from mlx_qwen35.prompt.prompt import Prompt

SEED = 0  # of the held-out items, as in evaluation.json
DEPTHS = (1, 2, 3)
TEMPS = (0.0, 1.0)
SEEDS = range(8)  # over which coupled acceptance is counted


@dataclass
class Score:
    """One task at one temperature."""

    task: str
    temp: float
    items: int
    tokens: float  # of an answer, the end token included
    shares: list[float | None]  # acceptance of draft 1, 2, 3
    a_step: list[float]  # tokens of a step at depth 1, 2, 3
    same: int  # answers with drafts that are those without, of `answers`
    answers: int
    guesses: int = 0
    coupled: float = 0.0
    classical: float = 0.0


@dataclass
class Account:
    """What the answers of one task at one temperature came to."""

    tokens: int = 0
    same: int = 0
    rounds: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: {depth: [] for depth in DEPTHS})

    def add(self, plain: Answer, drafted: Sequence[Answer]) -> None:
        self.tokens += len(plain.tokens)
        for depth, found in zip(DEPTHS, drafted, strict=True):
            self.same += found.tokens == plain.tokens
            self.rounds[depth] += found.rounds

    def score(self, task: str, temp: float, items: int) -> Score:
        steps = {depth: len(self.rounds[depth]) for depth in DEPTHS}
        a_step = [(self.tokens - items) / steps[depth] for depth in DEPTHS]  # the first token is of the prompt's pass
        found = shares(self.rounds[DEPTHS[-1]], DEPTHS[-1])
        found[0] = shares(self.rounds[1], 1)[0]
        return Score(task, temp, items, self.tokens / items, found, a_step, self.same, items * len(DEPTHS))


def transcript(model: Model, asked: Prompt, tokens: Sequence[int]) -> Text:
    """A prompt and its answer, of which the answer counts."""
    row = encode_media(model, asked)
    whole = [*row.tokens, *tokens]
    if not row.placeholders:
        return Text(whole, len(row.tokens))
    columns = np.concatenate([np.arange(p.start, p.stop) for p in row.placeholders]).astype(np.int32)
    visual = Visual(mx.zeros(len(columns), mx.int32), mx.array(columns), row.embeddings)
    return Text(whole, len(row.tokens), visual, positions(len(whole), row.placeholders)[:, None])


def measure(task: str, name: str, items: int) -> list[Score]:
    """Both temperatures of one task, half of the items thinking; all of them where the task is about thinking."""
    model, processor = mlx_qwen35.load(name)
    modes, limit = ALL_TASKS[task].modes, ALL_TASKS[task].limit
    drawn = [item for thinking in modes for item in items_of(task, thinking, items // len(modes), SEED)]
    accounts, texts = {temp: Account() for temp in TEMPS}, []
    for seed, item in enumerate(drawn):
        asked = prompt(processor, item)
        for temp, account in accounts.items():
            plain, *drafted = (
                answer(model, asked, depth, limit, Sampling(temp=temp), seed, processor.stop_ids,
                       processor.vocabulary)
                for depth in (0, *DEPTHS)
            )  # fmt: skip
            account.add(plain, drafted)
            if temp == 0:
                texts.append(transcript(model, asked, plain.tokens))
    scores = [account.score(task, temp, len(drawn)) for temp, account in accounts.items()]
    found = acceptance(model, texts, 1.0, SEEDS, processor.vocabulary)
    scores[1].guesses, scores[1].coupled, scores[1].classical = found.tokens, found.coupled, found.classical
    return scores


def overall(scores: Sequence[Score]) -> Score:
    """Means over tasks, which have as many items each; sums of counts."""
    def mean(values: list[float | None]) -> float | None:
        return float(np.mean([v for v in values if v is not None])) if any(v is not None for v in values) else None

    columns = list(zip(*(s.shares for s in scores), strict=True))
    steps = list(zip(*(s.a_step for s in scores), strict=True))
    return Score(
        "mean", scores[0].temp, sum(s.items for s in scores), mean([s.tokens for s in scores]),
        [mean(list(column)) for column in columns], [mean(list(column)) for column in steps],
        sum(s.same for s in scores), sum(s.answers for s in scores), sum(s.guesses for s in scores),
        mean([s.coupled for s in scores]), mean([s.classical for s in scores]),
    )  # fmt: skip


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def table(scores: Sequence[Score], rules: bool) -> str:
    """The scores of one temperature as a markdown table. rules: with coupled and classical acceptance."""
    titles = ["task", "tokens", "draft 1", "draft 2", "draft 3", "a step at 1", "at 2", "at 3"]
    titles += ["coupled", "classical"] if rules else []
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for score in (*scores, overall(scores)):
        cells = [score.task, f"{score.tokens:.1f}", *map(percent, score.shares), *(f"{n:.2f}" for n in score.a_step)]
        cells += [f"{100 * score.coupled:.2f} %", f"{100 * score.classical:.2f} %"] if rules else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--items", type=int, default=20, help="held-out items of each task, half of them thinking (20)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.items < 2 or args.items % 2:
        parser.error(f"--items must be even and at least 2, got {args.items}")
    scores: list[Score] = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(partial(measure, name=args.model, items=args.items), ALL_TASKS):
            print(found[0].task, file=sys.stderr, flush=True)
            scores += found
    for temp in TEMPS:
        own = [score for score in scores if score.temp == temp]
        total = overall(own)
        title = f"temperature {temp:g}" if temp else "greedy"
        print(f"{title}: {total.same} of {total.answers} answers with drafts are those without\n")
        print(f"{table(own, rules=temp > 0)}\n")
    if args.json:
        args.json.write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")


if __name__ == "__main__":
    main()
