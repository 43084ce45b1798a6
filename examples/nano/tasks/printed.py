"""Pictures of printed numbers."""

from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

from tasks.figures import SIDE, draw_ground
from tasks.items import Context, Task, Turn, vary

DIGIT_QUESTIONS = (
    "Which number is printed?",
    "What number is printed here?",
    "Read the number.",
    "What number do you see?",
    "Which number is in the picture?",
    "What does it say?",
)


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def draw_number(text: str, size: int, x: float, y: float, ink: tuple[int, int, int], ground: tuple[int, int, int]):
    """Prints `text` in Pillow's own font; `x` and `y` (0 to 1) place it in the free room of the picture."""
    image = Image.new("RGB", (SIDE, SIDE), ground)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=_font(size))
    at = (2 + x * (SIDE - 4 - (right - left)) - left, 2 + y * (SIDE - 4 - (bottom - top)) - top)
    pen.text(at, text, font=_font(size), fill=ink)
    return image


def _printed(rng: Random, easy: bool) -> Context:
    number = rng.randint(10, 99) if easy or rng.random() < 0.5 else rng.randint(100, 999)
    size = rng.randint(28, 40) if number < 100 else rng.randint(26, 32)
    dark = rng.choice(((0, 0, 0), (0, 0, 0), (40, 40, 40), (20, 20, 120), (140, 10, 10)))
    return Context(number, intro=(draw_number(str(number), size, rng.random(), rng.random(), dark, draw_ground(rng)),))


def _read(rng: Random, context: Context) -> Turn:
    number = str(context.data)
    thought = "I see " + ", ".join(number) + "."
    return Turn(vary(rng, rng.choice(DIGIT_QUESTIONS)), thought, number, f"digits:{number}")


DIGITS = Task("digits", _printed, _read)
