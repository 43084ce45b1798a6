"""Draws the pictures, the clip and the document that the examples ask about, larger than nano was trained with.

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
Figure = tuple[str, str, int, int, int]


def draw(*figures: Figure) -> Image.Image:
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


def vectors(*figures: Figure) -> str:
    """What `draw` draws, as operators of a PDF page half as many points wide."""
    red, green, blue = (part / 255 for part in GROUND)
    lines = [f"0.5 0 0 -0.5 0 {SIDE / 2} cm", f"{red:.3f} {green:.3f} {blue:.3f} rg 0 0 {SIDE} {SIDE} re f"]
    for colour, shape, x, y, r in figures:
        lines.append(" ".join(f"{part / 255:.3f}" for part in COLOURS[colour]) + " rg")
        if shape == "circle":  # four curves, whose handles are this long
            k = 0.5523 * r
            lines += [
                f"{x + r} {y} m", f"{x + r} {y + k} {x + k} {y + r} {x} {y + r} c",
                f"{x - k} {y + r} {x - r} {y + k} {x - r} {y} c", f"{x - r} {y - k} {x - k} {y - r} {x} {y - r} c",
                f"{x + k} {y - r} {x + r} {y - k} {x + r} {y} c f",
            ]  # fmt: skip
        elif shape == "square":
            lines.append(f"{x - 0.9 * r} {y - 0.9 * r} {1.8 * r} {1.8 * r} re f")
        else:
            lines.append(f"{x} {y - r} m {x - r} {y + r} l {x + r} {y + r} l f")
    return "\n".join(lines)


def write_document(path: Path, pages: list[str]) -> None:
    """A PDF of pages whose operators are given."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for i, page in enumerate(pages):
        box = f"[0 0 {SIDE // 2} {SIDE // 2}]"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox {box} /Resources << >> /Contents {4 + 2 * i} 0 R >>")
        objects.append(f"<< /Length {len(page)} >>\nstream\n{page}\nendstream")
    text, places = "%PDF-1.4\n", []
    for i, body in enumerate(objects, start=1):
        places.append(f"{len(text):010} 00000 n \n")
        text += f"{i} 0 obj\n{body}\nendobj\n"
    count = len(objects) + 1
    text += f"xref\n0 {count}\n0000000000 65535 f \n{''.join(places)}trailer\n<< /Size {count} /Root 1 0 R >>\n"
    path.write_text(f"{text}startxref\n{text.index('xref')}\n%%EOF\n")


def main() -> None:
    folder = Path(sys.argv[1])
    draw(("red", "circle", 70, 120, 52), ("blue", "square", 190, 140, 48)).save(folder / "shapes.png")
    draw(("green", "triangle", 130, 130, 68)).save(folder / "triangle.png")
    number("47").save(folder / "number.png")
    write_document(folder / "shapes.pdf", [
        vectors(("red", "circle", 70, 120, 52), ("blue", "square", 190, 140, 48)),
        vectors(("green", "triangle", 130, 130, 68)),
        vectors(("yellow", "square", 70, 130, 50), ("purple", "circle", 185, 120, 54)),
    ])  # fmt: skip
    path = [("purple", "circle", 52 + 20 * i, 150, 44) for i in range(8)]
    write_clip(folder / "moving.mp4", [draw(figure) for figure in path], fps=4)


if __name__ == "__main__":
    main()
