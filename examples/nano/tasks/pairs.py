"""Two pictures in one question."""

from dataclasses import replace
from random import Random
from typing import Any

from PIL import Image

from tasks.figures import COLOURS, SHAPES, Figure, describe, draw_figures, paint, picture_key
from tasks.items import Context, Task, Turn, sentence, vary

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
        first, second = (draw_figures(rng, 1 if easy or rng.random() < 0.6 else 2) for _ in range(2))
        if {str(f) for f in first} != {str(f) for f in second}:
            return _pair(first, second, (paint(first, rng), paint(second, rng)), rng)


def _twins(rng: Random, easy: bool) -> Context:
    """Half the time one picture twice, else two pictures that differ in a colour, a shape or altogether."""
    if rng.random() < 0.5:
        figures = draw_figures(rng, 1 if easy or rng.random() < 0.6 else 2)
        picture = paint(figures, rng)
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
    return _pair(first, second, (paint(first, rng), paint(second, rng)), rng)


def _two_seen(context: Context) -> str:
    return f"First: {describe(context.data[0])}. Second: {describe(context.data[1])}."


def _two_key(context: Context) -> str:
    return picture_key(context.data[0]) + "|" + picture_key(context.data[1])


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


WHICH_PICTURE = Task("which_picture", _two_pictures, _which, _two_again)
SAME_PICTURES = Task("same_pictures", _twins, _same, _two_again)
NTH_PICTURE = Task("nth_picture", _two_pictures, _nth, _two_again)
