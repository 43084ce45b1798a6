"""Draws animals that nano has never seen, and writes rows about them: a folder to train on.

    python examples/finetune/animals.py DATA

DATA gets train.jsonl, valid.jsonl and test.jsonl, and the pictures that their rows name. The same seed gives the same
files. Some colours of each animal are in test.jsonl alone. Rows about shapes keep what nano can do already.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

SIDE = 64  # pixels, as nano's pictures are
COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 225),
    "yellow": (245, 215, 40), "purple": (150, 50, 180), "black": (25, 25, 25),
}  # fmt: skip
ANIMALS, SHAPES = ("cat", "fish", "rabbit"), ("circle", "square", "triangle")
UNSEEN = {("cat", "purple"), ("fish", "red"), ("rabbit", "blue")}  # these are in test.jsonl alone
QUESTIONS = ("What do you see?", "What is this?", "What is in the picture?", "Describe the picture.")
ROWS = {"train": 720, "valid": 48, "test": 96}  # of them a third about shapes
SEED = 0


def draw(thing: str, colour: str, rng: Random) -> Image.Image:
    """A picture of one animal or shape on a light ground, its place, size and shade by chance."""
    ground = rng.choice((255, 250, 240, 230))
    image = Image.new("RGB", (SIDE, SIDE), (ground, ground, ground))
    shade, r = rng.randint(-15, 15), rng.uniform(13, 18)
    x, y = rng.uniform(1.5 * r, SIDE - 1.5 * r), rng.uniform(1.6 * r, SIDE - 1.1 * r)
    fill = tuple(min(255, max(0, channel + shade)) for channel in COLOURS[colour])
    pen = ImageDraw.Draw(image)

    def ellipse(left: float, top: float, right: float, bottom: float) -> None:
        pen.ellipse((x + r * left, y + r * top, x + r * right, y + r * bottom), fill=fill)

    def polygon(*corners: tuple[float, float]) -> None:
        pen.polygon([(x + r * across, y + r * down) for across, down in corners], fill=fill)

    if thing == "cat":
        ellipse(-1, -0.8, 1, 1)
        polygon((-0.95, 0), (-0.85, -1.5), (-0.1, -0.6))
        polygon((0.95, 0), (0.85, -1.5), (0.1, -0.6))
    elif thing == "fish":
        ellipse(-1.3, -0.6, 0.7, 0.6)
        polygon((0.3, 0), (1.4, -0.8), (1.4, 0.8))
    elif thing == "rabbit":
        ellipse(-0.8, -0.5, 0.8, 1)
        ellipse(-0.7, -1.6, -0.15, 0)
        ellipse(0.15, -1.6, 0.7, 0)
    elif thing == "circle":
        ellipse(-1, -1, 1, 1)
    elif thing == "square":
        polygon((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    else:
        polygon((0, -1), (-1, 1), (1, 1))
    return image


def things(split: str, count: int, rng: Random) -> list[tuple[str, str]]:
    """(animal or shape, colour) of each row; two thirds are animals. Half of the test's have an unseen colour."""
    pairs = [(animal, colour) for animal in ANIMALS for colour in COLOURS]
    known, unseen = [pair for pair in pairs if pair not in UNSEEN], sorted(UNSEEN)
    found = []
    for i in range(count):
        if i % 3 == 2:
            found.append((rng.choice(SHAPES), rng.choice(list(COLOURS))))
        else:
            found.append(rng.choice(unseen if split == "test" and i % 3 else known))
    rng.shuffle(found)
    return found


def write(folder: Path, rows: Mapping[str, int] = ROWS, seed: int = SEED) -> None:
    """The files of a data folder, in the chat form: a row is a user's message with a picture, and the answer."""
    for split, count in rows.items():
        rng, lines = Random(f"{seed} {split}"), []
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i, (thing, colour) in enumerate(things(split, count, rng)):
            name = f"{split}/{i:03}.png"
            draw(thing, colour, rng).save(folder / name)
            asked = [{"type": "image", "image": name}, {"type": "text", "text": rng.choice(QUESTIONS)}]
            answer = {"role": "assistant", "content": f"A {colour} {thing}."}
            lines.append(json.dumps({"messages": [{"role": "user", "content": asked}, answer]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def sheet(file: Path, seed: int = SEED) -> None:
    """One picture of every animal in every colour; those that are never shown in training have a frame."""
    rng, image = Random(seed), Image.new("RGB", (SIDE * len(COLOURS), SIDE * len(ANIMALS)))
    for row, animal in enumerate(ANIMALS):
        for column, colour in enumerate(COLOURS):
            drawn = draw(animal, colour, rng)
            if (animal, colour) in UNSEEN:
                ImageDraw.Draw(drawn).rectangle((2, 2, SIDE - 3, SIDE - 3), outline=(90, 90, 90), width=2)
            image.paste(drawn, (SIDE * column, SIDE * row))
    image.save(file, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also draw every animal in every colour")
    args = parser.parse_args()
    write(args.folder)
    if args.sheet:
        sheet(args.sheet)
