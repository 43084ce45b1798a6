"""Clips of one moving figure, and which of their frames a processor looks at."""

from random import Random

from tasks.figures import SIDE, Figure, draw_figures, draw_ground, draw_picture
from tasks.items import Clip, Context, Task, Turn, vary

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

MOVE_QUESTIONS = (
    "Which way does the {} move?",
    "In which direction does the {} move?",
    "Where does the {} go?",
    "Which way does it move?",
    "In which direction does it move?",
)


def _clip(rng: Random, easy: bool) -> Context:
    figure = draw_figures(rng, 1)[0]
    r = rng.uniform(8, 13)
    direction = rng.choice(list(DIRECTIONS))
    n, fps = rng.choice(((4, 2), (4, 2), (6, 2), (5, 2), (8, 4), (12, 6), (8, 2)))
    dx, dy = DIRECTIONS[direction]
    path = rng.uniform(20, SIDE - 2 * r - 2)
    start = rng.uniform(r + 1, SIDE - r - 1 - path)
    across = rng.uniform(r + 1, SIDE - r - 1)
    ground, shade = draw_ground(rng), rng.randint(-15, 15)
    frames = []
    for i in range(n):
        along = start + path * (i / (n - 1) if dx + dy > 0 else 1 - i / (n - 1))
        x, y = (along, across) if dx else (across, along)
        frames.append(draw_picture([Figure(figure.colour, figure.shape, x, y, r)], ground, shade))
    key = f"clip:{figure} {direction} {start:.1f} {path:.1f} {across:.1f}"
    return Context((figure, direction, key), intro=(Clip(frames, fps),))


def _direction(rng: Random, context: Context) -> Turn:
    figure, direction, key = context.data
    question = vary(rng, rng.choice(MOVE_QUESTIONS).format(figure.shape))
    return Turn(question, f"A {figure} moves {direction}.", direction, key)


def sample_indices(total: int, fps: float) -> list[int]:
    """Which frames of a clip are looked at: two a second, four at least (transformers' Qwen3VLVideoProcessor)."""
    n = min(max(int(total / fps * 2), 4), 768, total)
    return [round(i * (total - 1) / (n - 1)) for i in range(n)] if n > 1 else [0]


def timestamps(indices: list[int], fps: float) -> list[float]:
    """The mean time in seconds of each pair of frames; an odd last frame is paired with itself."""
    padded = indices + indices[-1:] * (len(indices) % 2)
    return [(a + b) / 2 / fps for a, b in zip(padded[::2], padded[1::2], strict=True)]


DIRECTION = Task("direction", _clip, _direction)
