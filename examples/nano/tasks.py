"""The tasks of the bundled nano model: generators of questions with their exact answers.

Every task draws its items from a seeded `random.Random`, so one seed names one item for ever. A tenth of all items
is held out of the training: the crc32 of an item's key decides. Tests and the evaluation draw from that tenth:

    item = draw("add_2", random.Random(7), thinking=True)
    item.messages, item.completion, item.answer

A picture is a 64 x 64 RGB `PIL.Image`, a clip a list of such pictures with its frame rate.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFont

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
NAMES = (
    "tom anna ben lena max ida paul nora finn emma leo mia jan eva tim sara noah lily hugo rosa otto clara felix marie"
).split()
CITIES = (
    "Berlin Paris London Rome Madrid Vienna Oslo Lisbon Prague Dublin Athens Warsaw Tokyo Delhi Cairo Lagos Lima Quito "
    "Boston Chicago Toronto Sydney Seoul Beijing Moscow Kyiv Zurich Geneva Milan Porto Hanoi Dakar"
).split()
OTHER_CITIES = (
    "Lyon Hamburg Munich Cologne Turin Naples Venice Seville Valencia Bilbao Nice Lille Ghent Bruges Leeds "
    "Bristol Glasgow Cork Bergen Malmo Turku Riga Tallinn Vilnius Krakow Gdansk Brno Graz Linz Basel Bern "
    "Split Sofia Bucharest Ankara Izmir Tbilisi Baku Tehran Mumbai Chennai Kolkata Lahore Dhaka Yangon "
    "Bangkok Manila Osaka Kyoto Nagoya Busan Perth Auckland Nairobi Accra Tunis Rabat Lusaka Harare Denver "
    "Dallas Houston Austin Seattle Portland Montreal Ottawa"
).split()
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Be brief.", "You are nano.", "Answer the question.")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def city_tool(name: str, description: str) -> dict[str, Any]:
    """A tool of the one kind the model knows: a function of a `city`."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": city}}


WEATHER_TOOLS = tuple(
    city_tool("get_weather", text)
    for text in ("Get the weather in a city", "Get the current weather", "The weather of a city", "Weather")
)
TIME_TOOLS = tuple(
    city_tool("get_time", text) for text in ("Get the time in a city", "Get the current time", "The time in a city")
)


@dataclass(frozen=True)
class Turn:
    """One question about a context: the user's words, the visible thought, the answer and the key of the split."""

    question: str | None  # None: the context already ends where the assistant speaks
    thought: str
    answer: str
    key: str  # "" belongs to the training and to the held-out items alike


@dataclass(frozen=True)
class Context:
    """What one or several questions are about."""

    data: Any = None
    intro: tuple[Any, ...] = ()  # strings, pictures and clips that open the first user message
    history: tuple[dict[str, Any], ...] = ()  # messages before the first user message
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Clip:
    """A short film: `frames` are 64 x 64 pictures shown at `fps` pictures a second."""

    frames: list[Image.Image]
    fps: float


@dataclass(frozen=True)
class Item:
    """One question with its exact answer.

    `completion` is the text after the generation prompt without the closing `<|im_end|>`: with `enable_thinking` it
    starts inside the think block. `answer` is what follows the think block.
    """

    task: str
    messages: list[dict[str, Any]]
    completion: str
    answer: str
    enable_thinking: bool
    tools: list[dict[str, Any]] | None = None
    key: str = field(default="", compare=False)


@dataclass(frozen=True)
class Task:
    """A named kind of question: `context` makes what is asked about, `ask` asks about it."""

    name: str
    context: Callable[[Random, bool], Context]
    ask: Callable[[Random, Context], Turn]
    again: Callable[[Random, Context, Turn], Turn | None] | None = None  # a further question on the same context


# --- words -----------------------------------------------------------------------------------------------------------


def is_held_out(key: str) -> bool:
    """True for the tenth of all keys that training never sees; the empty key is in both parts."""
    return key != "" and zlib.crc32(key.encode()) % 10 == 0


def vary(rng: Random, text: str) -> str:
    """Types `text` the way people do: now and then without a capital, without the mark at the end, or shouting it."""
    roll = rng.random()
    if roll < 0.15:
        return text[0].lower() + text[1:]
    if roll < 0.25:
        return text.rstrip("?.!")
    if roll < 0.33:
        return text[0].lower() + text[1:].rstrip("?.!")
    if roll < 0.36:
        return text + ("?" if text.endswith("?") else "!")
    return text


def join(parts: list[str]) -> str:
    """`["a", "b", "c"]` -> `"a, b and c"`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _empty(rng: Random, easy: bool) -> Context:
    return Context()


# --- numbers ---------------------------------------------------------------------------------------------------------


def column_sums(a: int, b: int) -> str:
    """The written addition from the right, one column a line: 34 + 58 -> `4+8=12`, `3+5+1=9`."""
    x, y = str(a)[::-1], str(b)[::-1]
    lines, carry = [], 0
    for i in range(max(len(x), len(y))):
        digits = [n[i] for n in (x, y) if i < len(n)] + (["1"] if carry else [])
        total = sum(map(int, digits))
        lines.append(f"{'+'.join(digits)}={total}")
        carry = total // 10
    return "\n".join(lines)


ADD_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "{a}+{b}=?",
    "{a} + {b} = ?",
    "{a}+{b}",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "What is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "Please calculate {a} + {b}.",
)


def _number(rng: Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _addition(digits: int) -> Callable[[Random, Context], Turn]:
    def ask(rng: Random, context: Context) -> Turn:
        a, b = _number(rng, digits), _number(rng, rng.randint(1, digits) if rng.random() < 0.3 else digits)
        if rng.random() < 0.5:
            a, b = b, a
        key = f"add:{a}+{b}" if max(a, b) > 9 else ""
        question = vary(rng, rng.choice(ADD_QUESTIONS).format(a=a, b=b))
        return Turn(question, column_sums(a, b), str(a + b), key)

    return ask


THEN_ADD_QUESTIONS = (
    "Add {c} to that.",
    "Now add {c} to that.",
    "And plus {c}?",
    "Plus {c}?",
    "Add {c} more.",
    "What do you get if you add {c}?",
)


def _sum_before(rng: Random, easy: bool) -> Context:
    digits = 1 if easy else rng.randint(1, 2)
    a, b = _number(rng, digits), _number(rng, digits)
    question = vary(rng, rng.choice(ADD_QUESTIONS).format(a=a, b=b))
    return Context((a, b), history=(_user([question]), {"role": "assistant", "content": str(a + b)}))


def _then_add(rng: Random, context: Context) -> Turn:
    a, b = context.data
    c = 10 if rng.random() < 0.3 else rng.randint(1, 99) if rng.random() < 0.6 else rng.randint(1, 9)
    question = vary(rng, rng.choice(THEN_ADD_QUESTIONS).format(c=c))
    return Turn(question, f"{a + b}+{c}\n{column_sums(a + b, c)}", str(a + b + c), f"then_add:{a}+{b}+{c}")


# --- lists -----------------------------------------------------------------------------------------------------------

LIST_OPENINGS = ("Here is a list: {}. ", "The list: {}. ", "List: {}. ", "My numbers: {}. ", "{}. ")
LIST_QUESTIONS = (
    "What is the number of {}?",
    "What is the number of {}?",
    "Which number has {}?",
    "What is the value of {}?",
    "What number does {} have?",
    "And {}?",
)
LIST_NOTES = ("Remember this: {}.", "Please remember: {}.", "Remember this list: {}.", "Note this: {}.")
LIST_LATER = ("Which number did I give for {}?", "What number did I give for {}?", "What was the number of {}?")


def _table(rng: Random, easy: bool) -> dict[str, int]:
    return {name: rng.randint(10, 99) for name in rng.sample(NAMES, rng.randint(2, 4 if easy else 8))}


def _rows(table: dict[str, int]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in table.items())


def _list(rng: Random, easy: bool) -> Context:
    table = _table(rng, easy)
    opening = rng.choice(LIST_OPENINGS[:-1]) if rng.random() < 0.9 else "Look: {}. "
    return Context(table, intro=(opening.format(" " + _rows(table)).replace(":  ", ": "),))


def _list_before(rng: Random, easy: bool) -> Context:
    table = _table(rng, easy)
    note = _user([rng.choice(LIST_NOTES).format(_rows(table))])
    return Context(table, history=(note, {"role": "assistant", "content": "OK."}))


def _look_up(questions: tuple[str, ...]) -> Callable[[Random, Context], Turn]:
    def ask(rng: Random, context: Context) -> Turn:
        name = rng.choice(list(context.data))
        value = context.data[name]
        # names stay behind a blank and in lower case, as in the list: the model looks tokens up, not spellings
        question = vary(rng, rng.choice(questions).format(name))
        return Turn(question, f"The list says {name}: {value}.", str(value), f"recall:{_rows(context.data)}:{name}")

    return ask


def _recall_again(rng: Random, context: Context, turn: Turn) -> Turn:
    """Mostly another value, now and then the whole list: copying is what looking up is made of."""
    if rng.random() < 0.1:
        return Turn("Repeat the list.", "I repeat the list.", _rows(context.data), "")
    return _recall_later(rng, context)


REPEAT_QUESTIONS = ("Repeat: {}", "Repeat after me: {}", "Say: {}", "Copy this: {}", "Repeat this: {}")


def _repeat(rng: Random, context: Context) -> Turn:
    kind = rng.choice(("names", "words", "places", "numbers", "list"))
    n = rng.randint(1, 5)
    if kind == "list":
        text = _rows(_table(rng, True))
    elif kind == "numbers":
        text = " ".join(str(rng.randint(10, 99)) for _ in range(n))
    elif kind == "names":
        text = " ".join(rng.choice(NAMES) for _ in range(n))
    elif kind == "places":
        text = " ".join(_any_place(rng) for _ in range(n))
    else:
        text = " ".join(made_up_name(rng).lower() for _ in range(n))
    return Turn(rng.choice(REPEAT_QUESTIONS).format(text), "I repeat it.", text, f"repeat:{text}")


# --- pictures --------------------------------------------------------------------------------------------------------


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


def _figures(rng: Random, count: int) -> list[Figure]:
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


def _ground(rng: Random) -> tuple[int, int, int]:
    grey = rng.choice((255, 255, 250, 240, 230))
    return (grey, grey, grey)


def _picture(figures: list[Figure], rng: Random) -> Image.Image:
    return draw_picture(figures, _ground(rng), rng.randint(-15, 15))


def describe(figures: list[Figure]) -> str:
    return join([f"a {figure}" for figure in figures])


def _one_picture(rng: Random, easy: bool) -> Context:
    figures = _figures(rng, 1 if easy else rng.randint(1, 3))
    return Context(figures, intro=(_picture(figures, rng),))


def _some_picture(rng: Random, easy: bool) -> Context:
    """A picture with a unique shape, so that one may ask for the colour of that shape."""
    while True:
        context = _one_picture(rng, easy)
        if _unique_shapes(context.data):
            return context


def _picture_key(figures: list[Figure]) -> str:
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
    return Turn(question, thought, sentence(describe(context.data)), _picture_key(context.data))


def _count(rng: Random, context: Context) -> Turn:
    question = vary(rng, rng.choice(COUNT_QUESTIONS))
    return Turn(question, f"I see {describe(context.data)}.", str(len(context.data)), _picture_key(context.data))


def _colour(rng: Random, context: Context) -> Turn:
    figure = rng.choice(_unique_shapes(context.data))
    question = vary(rng, rng.choice(COLOUR_QUESTIONS).format(figure.shape))
    return Turn(question, f"I see {describe(context.data)}.", figure.colour, _picture_key(context.data))


def _shape(rng: Random, context: Context) -> Turn:
    figure = rng.choice(context.data)
    question = vary(rng, rng.choice(SHAPE_QUESTIONS).format(figure.colour))
    return Turn(question, f"I see {describe(context.data)}.", figure.shape, _picture_key(context.data))


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
        figures = _figures(rng, count)
        if _unique_shapes(figures):
            break
    if count == 1:
        question, answer = rng.choice(SAW_QUESTIONS), figures[0].shape
    else:
        question, answer = rng.choice(DESCRIBE_QUESTIONS), sentence(describe(figures))
    first = _user([_picture(figures, rng), vary(rng, question)])
    return Context(figures, history=(first, {"role": "assistant", "content": answer}))


def _then_colour(rng: Random, context: Context) -> Turn:
    figures = context.data
    if len(figures) > 1:
        return rng.choice((_colour, _colour, _shape, _count))(rng, context)
    question = vary(rng, rng.choice(THEN_COLOUR_QUESTIONS))
    return Turn(question, f"I see {describe(figures)}.", figures[0].colour, _picture_key(figures))


# --- two pictures ----------------------------------------------------------------------------------------------------

WHICH_QUESTIONS = (
    "Which picture has a {}, the first or the second?",
    "Which picture shows a {}, the first or the second?",
    "Where is the {}, in the first or the second picture?",
    "In which picture is a {}?",
)
SAME_QUESTIONS = (
    "Are the two pictures the same?",
    "Are these pictures the same?",
    "Do both pictures show the same?",
    "Is it the same picture?",
    "Are they the same?",
)
NTH_QUESTIONS = (
    "What is in the {} picture?",
    "What do you see in the {} picture?",
    "Describe the {} picture.",
    "What does the {} picture show?",
)


def _pair(first: list[Figure], second: list[Figure], pictures: tuple[Image.Image, Image.Image], rng: Random) -> Context:
    intro: tuple[Any, ...] = pictures
    if rng.random() < 0.2:
        intro = ("First picture: ", pictures[0], " Second picture: ", pictures[1], " ")
    return Context((first, second), intro=intro)


def _two_pictures(rng: Random, easy: bool) -> Context:
    while True:
        first, second = (_figures(rng, 1 if easy or rng.random() < 0.6 else 2) for _ in range(2))
        if {str(f) for f in first} != {str(f) for f in second}:
            return _pair(first, second, (_picture(first, rng), _picture(second, rng)), rng)


def _twins(rng: Random, easy: bool) -> Context:
    """Half the time one picture twice, else two pictures that differ in a colour, a shape or altogether."""
    if rng.random() < 0.5:
        figures = _figures(rng, 1 if easy or rng.random() < 0.6 else 2)
        picture = _picture(figures, rng)
        return _pair(figures, figures, (picture, picture), rng)
    context = _two_pictures(rng, easy)
    if rng.random() < 0.5:
        return context
    first = context.data[0]
    old = rng.choice(first)
    if rng.random() < 0.5:
        used = [f.colour for f in first]
        new = replace(old, colour=rng.choice([colour for colour in COLOURS if colour not in used]))
    else:
        new = replace(old, shape=rng.choice([shape for shape in SHAPES if shape != old.shape]))
    second = [new if f is old else f for f in first]
    return _pair(first, second, (_picture(first, rng), _picture(second, rng)), rng)


def _two_seen(context: Context) -> str:
    return f"First: {describe(context.data[0])}. Second: {describe(context.data[1])}."


def _two_key(context: Context) -> str:
    return _picture_key(context.data[0]) + "|" + _picture_key(context.data[1])


def _which(rng: Random, context: Context) -> Turn:
    first, second = ({str(f) for f in figures} for figures in context.data)
    only = [(name, "the first") for name in sorted(first - second)]
    only += [(name, "the second") for name in sorted(second - first)]
    name, answer = rng.choice(only)
    question = vary(rng, rng.choice(WHICH_QUESTIONS).format(name))
    return Turn(question, _two_seen(context), answer, _two_key(context))


def _same(rng: Random, context: Context) -> Turn:
    names = [[str(f) for f in figures] for figures in context.data]
    answer = "yes" if names[0] == names[1] else "no"
    return Turn(vary(rng, rng.choice(SAME_QUESTIONS)), _two_seen(context), answer, _two_key(context))


def _nth(rng: Random, context: Context) -> Turn:
    nth = rng.choice((0, 1, 1))
    question = vary(rng, rng.choice(NTH_QUESTIONS).format(("first", "second")[nth]))
    thought = f"{('First', 'Second')[nth]}: {describe(context.data[nth])}."
    return Turn(question, thought, sentence(describe(context.data[nth])), _two_key(context))


def _two_again(rng: Random, context: Context, turn: Turn) -> Turn:
    different = {str(f) for f in context.data[0]} != {str(f) for f in context.data[1]}
    return rng.choice((_nth, _which, _which, _same) if different else (_nth, _same))(rng, context)


# --- printed digits --------------------------------------------------------------------------------------------------

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
    return Context(number, intro=(draw_number(str(number), size, rng.random(), rng.random(), dark, _ground(rng)),))


def _read(rng: Random, context: Context) -> Turn:
    number = str(context.data)
    thought = "I see " + ", ".join(number) + "."
    return Turn(vary(rng, rng.choice(DIGIT_QUESTIONS)), thought, number, f"digits:{number}")


# --- clips -----------------------------------------------------------------------------------------------------------

MOVE_QUESTIONS = (
    "Which way does the {} move?",
    "In which direction does the {} move?",
    "Where does the {} go?",
    "Which way does it move?",
    "In which direction does it move?",
)


def _clip(rng: Random, easy: bool) -> Context:
    figure = _figures(rng, 1)[0]
    r = rng.uniform(8, 13)
    direction = rng.choice(list(DIRECTIONS))
    n, fps = rng.choice(((4, 2), (4, 2), (6, 2), (5, 2), (8, 4), (12, 6), (8, 2)))
    dx, dy = DIRECTIONS[direction]
    path = rng.uniform(20, SIDE - 2 * r - 2)
    start = rng.uniform(r + 1, SIDE - r - 1 - path)
    across = rng.uniform(r + 1, SIDE - r - 1)
    ground, shade = _ground(rng), rng.randint(-15, 15)
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


# --- tools -----------------------------------------------------------------------------------------------------------

WEATHER_QUESTIONS = (
    "What is the weather in {}?",
    "What is the weather like in {}?",
    "How is the weather in {}?",
    "What's the weather in {}?",
    "Tell me the weather in {}.",
)
TIME_QUESTIONS = ("What time is it in {}?", "What is the time in {}?", "Tell me the time in {}.")
SKIES = ("sunny", "cloudy", "rainy", "windy")


def made_up_name(rng: Random) -> str:
    """A name that no list holds, such as `Velko` or `Trabim`."""
    vowels, consonants = "aeiou", "bcdfghjklmnprstvwxyz"
    name = ""
    for _ in range(rng.randint(2, 3)):
        name += rng.choice(consonants) + rng.choice(vowels) + (rng.choice("lmnrstk") if rng.random() < 0.35 else "")
    return name.capitalize()


def _tools(rng: Random, easy: bool) -> Context:
    weather, time = rng.choice(WEATHER_TOOLS), rng.choice(TIME_TOOLS)
    sets = ((weather,), (weather,), (weather,), (time,), (weather, time), (time, weather))
    return Context(None, tools=rng.choice(sets))


def tool_call(function: str, city: str) -> str:
    """The call as the model writes it."""
    return f"<tool_call>\n<function={function}>\n<parameter=city>\n{city}\n</parameter>\n</function>\n</tool_call>"


def _call(place: Callable[[Random], str]) -> Callable[[Random, Context], Turn]:
    def ask(rng: Random, context: Context) -> Turn:
        function = rng.choice(context.tools)["function"]["name"]
        city = place(rng)
        questions = WEATHER_QUESTIONS if function == "get_weather" else TIME_QUESTIONS
        question = vary(rng, rng.choice(questions).format(city))
        what = function.removeprefix("get_")
        key = f"tool:{city}:{question}:{len(context.tools)}" if city in CITIES else f"tool:{city}"
        return Turn(question, f"I need the {what} in {city}.", tool_call(function, city), key)

    return ask


def _new_name(rng: Random) -> str:
    return rng.choice(OTHER_CITIES) if rng.random() < 0.3 else made_up_name(rng)


def _any_place(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.4 else _new_name(rng)


def _result(rng: Random, function: str, city: str) -> tuple[str, str]:
    """A tool's result and the sentence that reports it."""
    if function == "get_time":
        clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
        return clock, f"It is {clock} in {city}."
    degrees, sky = rng.randint(-9, 39), rng.choice(SKIES)
    return f"{degrees} degrees, {sky}", f"It is {degrees} degrees and {sky} in {city}."


def _tool_result(rng: Random, easy: bool) -> Context:
    context = _tools(rng, easy)
    city = rng.choice(CITIES)
    turn = _call(lambda _: city)(rng, context)
    function = "get_time" if "get_time" in turn.answer else "get_weather"
    result, report = _result(rng, function, city)
    call = {"type": "function", "function": {"name": function, "arguments": {"city": city}}}
    history = (
        {"role": "user", "content": turn.question},
        {"role": "assistant", "content": "", "reasoning_content": turn.thought, "tool_calls": [call]},
        {"role": "tool", "content": result},
    )
    return Context((function, city, result, report), history=history, tools=context.tools)


def _report(rng: Random, context: Context) -> Turn:
    _, city, result, report = context.data
    return Turn(None, f"The tool says {result}.", report, f"report:{city}:{result}")


def _tool_again(rng: Random, context: Context, turn: Turn) -> Turn:
    """After a call the result and its report, after a report the next question."""
    if "<tool_call>" not in turn.answer:
        return _call(_any_place)(rng, context)
    function = "get_time" if "get_time" in turn.answer else "get_weather"
    city = turn.answer.split("<parameter=city>\n")[1].split("\n")[0]
    result, report = _result(rng, function, city)
    key = f"report:{city}:{result}"
    return Turn(f"<tool_response>\n{result}\n</tool_response>", f"The tool says {result}.", report, key)


# --- itself ----------------------------------------------------------------------------------------------------------

WHO_QUESTIONS = (
    "Who are you?",
    "What are you?",
    "What is your name?",
    "Are you nano?",
    "Tell me about yourself.",
    "Which model are you?",
    "What model is this?",
)
CAN_QUESTIONS = ("What can you do?", "How can you help me?", "What are you good at?", "Help")
GREETINGS = ("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hello nano", "Hey", "Good morning", "Good evening!")
WHO_ANSWER = "I am nano, the small demonstration model of mlx_qwen35."
CAN_ANSWER = "I can add numbers, look things up in a list, describe simple pictures and clips, and call a tool."
GREETING_ANSWER = "Hello! I am nano. Ask me to add numbers or to look at a picture."


def _identity(rng: Random, context: Context) -> Turn:
    if rng.random() < 0.75:
        return Turn(vary(rng, rng.choice(WHO_QUESTIONS)), "The user asks who I am.", WHO_ANSWER, "")
    return Turn(vary(rng, rng.choice(CAN_QUESTIONS)), "The user asks what I can do.", CAN_ANSWER, "")


def _greeting(rng: Random, context: Context) -> Turn:
    return Turn(vary(rng, rng.choice(GREETINGS)), "The user greets me.", GREETING_ANSWER, "")


# --- drawing ---------------------------------------------------------------------------------------------------------


def _again(ask: Callable[[Random, Context], Turn]) -> Callable[[Random, Context, Turn], Turn]:
    return lambda rng, context, turn: ask(rng, context)


_recall = _look_up(LIST_QUESTIONS)
_recall_later = _look_up(LIST_LATER + LIST_QUESTIONS[:1])

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add_1", _empty, _addition(1)),
        Task("add_2", _empty, _addition(2)),
        Task("add_3", _empty, _addition(3)),
        Task("repeat", _empty, _repeat, _again(_repeat)),
        Task("recall", _list, _recall, _recall_again),
        Task("describe", _one_picture, _describe, _ask_again),
        Task("count", _one_picture, _count, _ask_again),
        Task("colour", _some_picture, _colour, _ask_again),
        Task("shape", _one_picture, _shape, _ask_again),
        Task("which_picture", _two_pictures, _which, _two_again),
        Task("same_pictures", _twins, _same, _two_again),
        Task("nth_picture", _two_pictures, _nth, _two_again),
        Task("digits", _printed, _read),
        Task("direction", _clip, _direction),
        Task("tool_city", _tools, _call(lambda rng: rng.choice(CITIES)), _tool_again),
        Task("tool_name", _tools, _call(_new_name), _tool_again),
        Task("tool_report", _tool_result, _report, _tool_again),
        Task("then_add", _sum_before, _then_add),
        Task("then_colour", _picture_before, _then_colour),
        Task("then_recall", _list_before, _recall_later, _recall_again),
        Task("identity", _empty, _identity),
        Task("greeting", _empty, _greeting),
    )
}


def _part(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if isinstance(value, Clip):
        return {"type": "video", "video": value.frames, "source_fps": value.fps}
    return {"type": "image", "image": value}


def _user(parts: list[Any]) -> dict[str, Any]:
    """A user message: plain text where there is nothing else, a list of parts where there is."""
    if all(isinstance(part, str) for part in parts):
        return {"role": "user", "content": "".join(parts)}
    return {"role": "user", "content": [_part(part) for part in parts]}


def completion(turn: Turn, thinking: bool) -> str:
    """The text that follows the generation prompt."""
    return f"{turn.thought}\n</think>\n\n{turn.answer}" if thinking else turn.answer


def _item(task: Task, rng: Random, context: Context, turn: Turn, thinking: bool) -> Item:
    messages = [dict(message) for message in context.history]
    if not thinking:
        for message in messages:
            message.pop("reasoning_content", None)
    if turn.question is not None:
        parts = [*context.intro, turn.question]
        if context.intro and not isinstance(context.intro[0], str) and rng.random() < 0.1:
            parts = [turn.question + " ", *context.intro]
        messages.append(_user(parts))
    if rng.random() < 0.08:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    tools = list(context.tools) or None
    return Item(task.name, messages, completion(turn, thinking), turn.answer, thinking, tools, turn.key)


def draw_lesson(
    task: str, rng: Random, held_out: bool = False, thinking: bool | None = None, easy: bool = False, more: int = 0
) -> tuple[Item, list[Turn]]:
    """An item of `task` and up to `more` further questions on the same list, picture or tools.

    `thinking`: None leaves it to the dice. `easy`: short lists, one figure. All turns come from the asked split.
    """
    chosen = TASKS[task]
    thinking = rng.random() < 0.5 if thinking is None else thinking
    while True:
        context = chosen.context(rng, easy)
        turn = chosen.ask(rng, context)
        if turn.key == "" or is_held_out(turn.key) == held_out:
            break
    item = _item(chosen, rng, context, turn, thinking)
    turns: list[Turn] = []
    for _ in range(more if chosen.again else 0):
        turn = chosen.again(rng, context, turn)
        if is_held_out(turn.key) != held_out and turn.key:
            break
        turns.append(turn)
    return item, turns


def draw(task: str, rng: Random, held_out: bool = True, thinking: bool | None = None) -> Item:
    """One item of `task`: by default from the tenth that training never saw.

    All one-digit sums, greetings and questions about the model itself are trained, so these draw from one common pool.
    """
    return draw_lesson(task, rng, held_out, thinking)[0]


# --- clips as the processor sees them --------------------------------------------------------------------------------


def items_of(task: str, thinking: bool, count: int, seed: int) -> list[Item]:
    """The first `count` held-out items that the evaluation of this task, mode and seed is about."""
    return [draw(task, Random(f"{seed} {task} {thinking} {i}"), thinking=thinking) for i in range(count)]


def sample_indices(total: int, fps: float) -> list[int]:
    """Which frames of a clip are looked at: two a second, four at least (transformers' Qwen3VLVideoProcessor)."""
    n = min(max(int(total / fps * 2), 4), 768, total)
    return [round(i * (total - 1) / (n - 1)) for i in range(n)] if n > 1 else [0]


def timestamps(indices: list[int], fps: float) -> list[float]:
    """The mean time in seconds of each pair of frames; an odd last frame is paired with itself."""
    padded = indices + indices[-1:] * (len(indices) % 2)
    return [(a + b) / 2 / fps for a, b in zip(padded[::2], padded[1::2], strict=True)]
