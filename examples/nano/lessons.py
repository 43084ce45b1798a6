"""What nano is trained on: how often each task is drawn, and the rows its lessons are packed into."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from encoding import Encoded, Encoder, positions
from forward import CHUNK, Batch
from tasks import draw_lesson
from tasks.needles import needle, spread

LONG_TOKENS = 2048  # of a step with long rows and of each worker, unless its one row is longer


@dataclass(frozen=True)
class Lesson:
    """How often a task is drawn, and how many further questions on the same matter may follow."""

    weight: float
    more: int = 0
    thinking: float = 0.5
    easy: float = 0.0  # share of the short form (few entries, one figure) throughout the run


LESSONS = {
    "add_1": Lesson(0.03),
    "add_2": Lesson(0.08, thinking=0.25),
    "add_3": Lesson(0.14, thinking=0.3),
    "repeat": Lesson(0.10, more=1),
    "recall": Lesson(0.12, more=6, easy=0.4),
    "describe": Lesson(0.03, more=2),
    "count": Lesson(0.02, more=2),
    "colour": Lesson(0.03, more=2),
    "shape": Lesson(0.08, more=3),
    "which_picture": Lesson(0.05, more=2),
    "same_pictures": Lesson(0.04, more=1),
    "nth_picture": Lesson(0.03, more=2),
    "digits": Lesson(0.12),
    "direction": Lesson(0.08),
    "tool_city": Lesson(0.02, more=3),
    "tool_name": Lesson(0.05, more=4),
    "tool_report": Lesson(0.02, more=1),
    "then_add": Lesson(0.05),
    "then_colour": Lesson(0.05),
    "then_recall": Lesson(0.04, more=4, easy=0.4),
    "identity": Lesson(0.015),
    "greeting": Lesson(0.01),
    "choose_tool": Lesson(0.08, more=2),
    "typed_call": Lesson(0.10, more=3),
    "several_calls": Lesson(0.09, more=2),
    "no_call": Lesson(0.06),
    "from_results": Lesson(0.07),
    "json_schema": Lesson(0.08),
    "long_sum": Lesson(0.06, thinking=1.0),
    "closed_sum": Lesson(0.05, thinking=1.0),
    "closed_thought": Lesson(0.05, thinking=1.0),
    "needle": Lesson(0.12, more=5, thinking=0.15),
}


EASY_FACTORS = {"add_1": 3.0, "add_3": 0.2, "tool_report": 0.0}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result beside the code."""

    minutes: float = 60.0
    seed: int = 0
    product: str = "bfloat16"  # type of the large products; float32 is faster where the CPU lacks the instructions
    rows: int = 4  # per worker and step
    tokens: int = 352  # of a row
    long_every: int = 4  # steps from one with long rows to the next
    long_tokens: tuple[int, int] = (448, 4096)  # of a long row
    long_from: float = 0.4  # part of the time from whose end on they are as long as that
    rate: float = 4.5e-3
    adam_ratio: float = 0.6
    hold: float = 0.4  # part of the time at the full rate
    warmup: int = 60  # steps
    easy: float = 0.1  # part of the time with short lists and single figures
    boost: tuple[tuple[str, float], ...] = ()  # tasks drawn more often: name and factor


# --- rows ------------------------------------------------------------------------------------------------------------


def draw_encoded(encoder: Encoder, rng: Random, settings: Settings, easy: bool) -> Encoded:
    """One lesson of the mix that fits a row."""
    boost = dict(settings.boost)
    names = list(LESSONS)
    weights = [LESSONS[name].weight * boost.get(name, 1.0) for name in names]
    if easy:
        weights = [w * EASY_FACTORS.get(name, 1.0) for name, w in zip(names, weights, strict=True)]
    name = rng.choices(names, weights)[0]
    lesson = LESSONS[name]
    more = rng.randint((lesson.more + 1) // 2, lesson.more)
    easy = easy or rng.random() < lesson.easy
    while True:
        thinking = rng.random() < lesson.thinking
        encoded = encoder.lesson(*draw_lesson(name, rng, thinking=thinking, easy=easy, more=more))
        if len(encoded.ids) <= settings.tokens:
            return encoded
        more = max(more - 1, 0)


def long_rows(encoder: Encoder, rng: Random, tokens: int) -> list[Encoded]:
    """Rows of one haystack each and of as many questions about it as fit."""
    rows = []
    for _ in range(max(1, LONG_TOKENS // tokens)):
        more = min(24, tokens // 80)
        thinking = rng.random() < LESSONS["needle"].thinking
        text = needle(tokens - 30 * (more + 2))
        encoded = encoder.lesson(*draw_lesson(text, rng, thinking=thinking, more=more))
        rows.append(Encoded(encoded.ids[:tokens], encoded.learn[:tokens], []))
    return rows


def packed_rows(encoder: Encoder, settings: Settings, rng: Random, waiting: list[Encoded], easy: bool) -> list[Encoded]:
    """Rows of as many lessons as fit; those that did not fit wait in `waiting` for the next ones."""
    rows = []
    for _ in range(settings.rows):
        row = Encoded([], [], [])
        while True:
            while len(waiting) < 12:
                waiting.append(draw_encoded(encoder, rng, settings, easy))
            fits = [i for i, e in enumerate(waiting) if len(row.ids) + len(e.ids) <= settings.tokens]
            if not fits:
                break
            chosen = waiting.pop(fits[0])
            row.ids += chosen.ids
            row.learn += chosen.learn
            row.patches += chosen.patches
        rows.append(row)
    return rows


def stacked(encoder: Encoder, rows: list[Encoded], tokens: int) -> Batch:
    """Rows as one batch, padded to `tokens`."""
    ids = [row.ids + [encoder.pad] * (tokens - len(row.ids)) for row in rows]
    learn = [row.learn + [False] * (tokens - len(row.learn)) for row in rows]
    patches = [patch for row in rows for patch in row.patches]
    where = np.stack([positions(row, encoder.image_pad, encoder.video_pad) for row in ids], axis=1)
    return Batch(
        torch.tensor(ids),
        torch.from_numpy(where),
        torch.tensor(learn),
        torch.from_numpy(np.stack(patches)) if patches else torch.zeros(0, 16, 1536),
    )


def batches(encoder: Encoder, settings: Settings, rank: int, first: int, progress: list[float]) -> Iterator[Batch]:
    """Endless batches of one worker from step `first` on; `progress[0]` (0 to 1) tells the easy beginning.

    The long rows of a step are equally long for all workers, so that none waits for the other.
    """
    rng = Random(settings.seed * 1000 + rank + 7919 * first)
    waiting: list[Encoded] = []
    for step in itertools.count(first):
        if step % settings.long_every == settings.long_every - 1:
            low, high = settings.long_tokens
            grown = min(1.0, progress[0] / settings.long_from)
            tokens = spread(Random(f"{settings.seed} {step}"), low, round(1024 + grown * (high - 1024)))
            tokens -= tokens % CHUNK
            yield stacked(encoder, long_rows(encoder, rng, tokens), tokens)
        else:
            easy = progress[0] < settings.easy
            yield stacked(encoder, packed_rows(encoder, settings, rng, waiting, easy), settings.tokens)
