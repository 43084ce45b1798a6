"""Draws the pictures and the clip that the examples ask about, four times the size that nano was trained with.

    python examples/nano/pictures.py examples/pictures
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont
from tasks import COLOURS

SIDE = 256
GROUND = (250, 250, 250)


def draw(*figures: tuple[str, str, int, int, int]) -> Image.Image:
    """Figures as (colour, shape, x and y of the centre, half the size) on a plain ground."""
    image = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen = ImageDraw.Draw(image)
    for colour, shape, x, y, r in figures:
        fill = COLOURS[colour]
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif shape == "square":
            pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)
        else:
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    return image


def number(text: str) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), GROUND)
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), text, (0, 0, 0), ImageFont.load_default(size=136), anchor="mm")
    return image


def write_clip(path: Path, frames: list[Image.Image], fps: int) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())


def main() -> None:
    folder = Path(sys.argv[1])
    draw(("red", "circle", 70, 120, 52), ("blue", "square", 190, 140, 48)).save(folder / "shapes.png")
    draw(("green", "triangle", 130, 130, 68)).save(folder / "triangle.png")
    number("47").save(folder / "number.png")
    path = [("purple", "circle", 52 + 20 * i, 150, 44) for i in range(8)]
    write_clip(folder / "moving.mp4", [draw(figure) for figure in path], fps=4)


if __name__ == "__main__":
    main()
