"""Pictures of one to three figures, and questions about them."""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from tasks.items import Context, Task, Turn, join, sentence, user_message, vary

SIDE = 64  # pixels: edge of every picture the model is trained on

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (245, 215, 40),
    "purple": (150, 50, 180),
    "black": (25, 25, 25),
}

SHAPES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Figure:
    """One drawn figure; `x`, `y` is its centre and `r` half its size in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    r: float

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


def draw_picture(figures: list[Figure], background: tuple[int, int, int], shade: int = 0) -> Image.Image:
    """Draws the figures on a plain ground; `shade` is added to every channel of the colours."""
    image = Image.new("RGB", (SIDE, SIDE), background)
    pen = ImageDraw.Draw(image)
    for f in figures:
        colour = tuple(min(max(channel + shade, 0), 255) for channel in COLOURS[f.colour])
        box = (f.x - f.r, f.y - f.r, f.x + f.r, f.y + f.r)
        if f.shape == "circle":
            pen.ellipse(box, fill=colour)
        elif f.shape == "square":
            pen.rectangle((f.x - 0.9 * f.r, f.y - 0.9 * f.r, f.x + 0.9 * f.r, f.y + 0.9 * f.r), fill=colour)
        else:
            pen.polygon([(f.x, f.y - f.r), (f.x - f.r, f.y + f.r), (f.x + f.r, f.y + f.r)], fill=colour)
    return image


def draw_figures(rng: Random, count: int) -> list[Figure]:
    """`count` figures of different colours from left to right, each in its own third (half) of the picture."""
    width = SIDE / count
    figures = []
    for i, colour in enumerate(rng.sample(list(COLOURS), count)):
        largest = min(width / 2 - 1, 18)
        r = rng.uniform(0.7 * largest if count > 1 else 9, largest)
        x = rng.uniform(i * width + r + 0.5, (i + 1) * width - r - 0.5)
        shape, y = rng.choice(SHAPES), rng.uniform(r + 1, SIDE - r - 2)
        figures.append(Figure(colour, shape, round(x), round(y), round(r, 1)))
    return figures


def draw_ground(rng: Random) -> tuple[int, int, int]:
    grey = rng.choice((255, 255, 250, 240, 230))
    return (grey, grey, grey)


def paint(figures: list[Figure], rng: Random) -> Image.Image:
    return draw_picture(figures, draw_ground(rng), rng.randint(-15, 15))


def describe(figures: list[Figure]) -> str:
    return join([f"a {figure}" for figure in figures])


def _one_picture(rng: Random, easy: bool) -> Context:
    figures = draw_figures(rng, 1 if easy else rng.randint(1, 3))
    return Context(figures, intro=(paint(figures, rng),))


def _some_picture(rng: Random, easy: bool) -> Context:
    """A picture with a unique shape, so that one may ask for the colour of that shape."""
    while True:
        context = _one_picture(rng, easy)
        if _unique_shapes(context.data):
            return context


def picture_key(figures: list[Figure]) -> str:
    return "picture:" + ";".join(f"{f} {f.x} {f.y} {f.r}" for f in figures)


DESCRIBE_QUESTIONS = (
    "What do you see?",
    "What is in the picture?",
    "Describe the picture.",
    "Describe this picture.",
    "What is this?",
    "What is in this image?",
    "Describe the image.",
)
COUNT_QUESTIONS = (
    "How many shapes are there?",
    "How many shapes do you see?",
    "Count the shapes.",
    "How many shapes are in the picture?",
    "How many figures are there?",
)
COLOUR_QUESTIONS = (
    "What colour is the {}?",
    "What colour is the {}?",
    "What color is the {}?",
    "Which colour has the {}?",
)
SHAPE_QUESTIONS = (
    "What shape is {}?",
    "Which shape is {}?",
    "What shape is the {} one?",
    "Which shape is the {} one?",
    "What is the {} shape?",
)


def _unique_shapes(figures: list[Figure]) -> list[Figure]:
    shapes = [f.shape for f in figures]
    return [f for f in figures if shapes.count(f.shape) == 1]


def _describe(rng: Random, context: Context) -> Turn:
    n = len(context.data)
    thought = f"There {'is 1 shape' if n == 1 else f'are {n} shapes'}."
    question = vary(rng, rng.choice(DESCRIBE_QUESTIONS))
    return Turn(question, thought, sentence(describe(context.data)), picture_key(context.data))


def _count(rng: Random, context: Context) -> Turn:
    question = vary(rng, rng.choice(COUNT_QUESTIONS))
    return Turn(question, f"I see {describe(context.data)}.", str(len(context.data)), picture_key(context.data))


def _colour(rng: Random, context: Context) -> Turn:
    figure = rng.choice(_unique_shapes(context.data))
    question = vary(rng, rng.choice(COLOUR_QUESTIONS).format(figure.shape))
    return Turn(question, f"I see {describe(context.data)}.", figure.colour, picture_key(context.data))


def _shape(rng: Random, context: Context) -> Turn:
    figure = rng.choice(context.data)
    question = vary(rng, rng.choice(SHAPE_QUESTIONS).format(figure.colour))
    return Turn(question, f"I see {describe(context.data)}.", figure.shape, picture_key(context.data))


def _ask_again(rng: Random, context: Context, turn: Turn) -> Turn:
    asks = [_shape, _shape, _shape, _count, _describe]
    if _unique_shapes(context.data):
        asks.append(_colour)
    return rng.choice(asks)(rng, context)


SAW_QUESTIONS = ("What shape is it?", "Which shape do you see?", "What shape is this?", "Which shape is this?")
THEN_COLOUR_QUESTIONS = ("And what colour is it?", "What colour is it?", "And which colour?", "And what color is it?")


def _picture_before(rng: Random, easy: bool) -> Context:
    count = 1 if easy or rng.random() < 0.6 else rng.randint(2, 3)
    while True:
        figures = draw_figures(rng, count)
        if _unique_shapes(figures):
            break
    if count == 1:
        question, answer = rng.choice(SAW_QUESTIONS), figures[0].shape
    else:
        question, answer = rng.choice(DESCRIBE_QUESTIONS), sentence(describe(figures))
    first = user_message([paint(figures, rng), vary(rng, question)])
    return Context(figures, history=(first, {"role": "assistant", "content": answer}))


def _then_colour(rng: Random, context: Context) -> Turn:
    figures = context.data
    if len(figures) > 1:
        return rng.choice((_colour, _colour, _shape, _count))(rng, context)
    question = vary(rng, rng.choice(THEN_COLOUR_QUESTIONS))
    return Turn(question, f"I see {describe(figures)}.", figures[0].colour, picture_key(figures))


DESCRIBE = Task("describe", _one_picture, _describe, _ask_again)
COUNT = Task("count", _one_picture, _count, _ask_again)
COLOUR = Task("colour", _some_picture, _colour, _ask_again)
SHAPE = Task("shape", _one_picture, _shape, _ask_again)
THEN_COLOUR = Task("then_colour", _picture_before, _then_colour)
