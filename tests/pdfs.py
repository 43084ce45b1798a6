"""PDFs for tests, written by hand or by Pillow, and the mark of tests that draw them."""

import importlib.util
import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

draws = pytest.mark.skipif(importlib.util.find_spec("pypdfium2") is None, reason="pypdfium2 is not installed")


def page(content: str = "", box: str = "0 0 96 48", more: str = "") -> tuple[str, str]:
    """A page and what is drawn on it. box: of the medium, in points; more: further entries of the page."""
    return f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] /Contents CONTENT {more} >>", content


def pdf(*pages: tuple[str, str], objects: Sequence[str] = (), trailer: str = "") -> bytes:
    """A file of these pages. objects: further ones, whose numbers begin behind the pages' own."""
    first = 3
    kids = " ".join(f"{first + 2 * i} 0 R" for i in range(len(pages)))
    bodies = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for i, (entries, content) in enumerate(pages):
        bodies += [entries.replace("CONTENT", f"{first + 2 * i + 1} 0 R")]
        bodies += [f"<< /Length {len(content)} >>\nstream\n{content}\nendstream"]
    out, places = b"%PDF-1.7\n", []
    for number, body in enumerate([*bodies, *objects], start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n" + "".join(f"{at:010} 00000 n \n" for at in places)
    end = f"trailer\n<< /Size {len(places) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + table.encode() + end.encode()


def filled(colour: str, box: str = "0 0 9999 9999") -> str:
    """What fills a box, given as x y width height, with a colour, given as three numbers from 0 to 1."""
    return f"{colour} rg {box} re f"


def locked() -> bytes:
    """A file that no password opens: what is to prove one is zeros."""
    zeros = "0" * 64
    return pdf(
        page(), objects=[f"<< /Filter /Standard /V 1 /R 2 /O <{zeros}> /U <{zeros}> /P -4 >>"],
        trailer=f"/Encrypt 5 0 R /ID [<{'0' * 32}> <{'0' * 32}>]",
    )  # fmt: skip


def nested(depth: int, times: int) -> bytes:
    """A page that draws a form so many times, which draws the next so many times, and so on: times ** depth lines."""
    forms = []
    for number in range(5, 5 + depth):
        last = number == 4 + depth
        content = "0 0 m 96 48 l S" if last else "/F Do " * times
        inner = "" if last else f"/Resources << /XObject << /F {number + 1} 0 R >> >>"
        head = f"<< /Type /XObject /Subtype /Form /BBox [0 0 96 48] {inner} /Length {len(content)} >>"
        forms.append(f"{head}\nstream\n{content}\nendstream")
    return pdf(page("/F Do " * times, more="/Resources << /XObject << /F 5 0 R >> >>"), objects=forms)


def photographed(*images: np.ndarray, dpi: int = 144) -> bytes:
    """A file in which each page is a picture, stored without loss."""
    out = io.BytesIO()
    first, *rest = (Image.fromarray(image).convert("P", palette=Image.Palette.ADAPTIVE) for image in images)
    first.save(out, "PDF", save_all=True, append_images=rest, resolution=dpi)
    return out.getvalue()


def patterned(seed: int, height: int, width: int) -> np.ndarray:
    """Random blocks of 16 x 16 pixels in few colours, so that a palette holds them."""
    blocks = np.random.default_rng(seed).integers(0, 4, (height // 16, width // 16, 3)) * 85
    return np.repeat(np.repeat(blocks, 16, 0), 16, 1).astype(np.uint8)
