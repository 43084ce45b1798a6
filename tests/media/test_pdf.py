"""Pages of PDFs: which part of a page is drawn, in which size, and what is refused by name."""

import signal
import sys
import threading

import numpy as np
import pytest
from pdfs import draws, filled, locked, nested, page, patterned, pdf, photographed
from refusing import refused

from mlx_qwen35 import VisionOptions
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.media.pdf import MOST_POINTS, Document, open_pdf
from mlx_qwen35.media.preprocess import Preprocessor
from mlx_qwen35.media.preprocessor_files import read_preprocessor

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
FULL = filled("1 0 0")
pytestmark = draws


def preprocessor(most: int = 1 << 24) -> Preprocessor:
    read = read_preprocessor(resolve("nano"), "image", read_config(resolve("nano")).vision)
    return Preprocessor(read.config, read.values, 32 * 32, most, read.sampling)


def drawn(*pages: tuple[str, str], number: int = 1, size: tuple[int, int] = (48, 96), **more) -> np.ndarray:
    return open_pdf(pdf(*pages, **more)).drawn(number, size)


def corner(pixels: np.ndarray, vertical: int, horizontal: int) -> tuple[int, ...]:
    """The colour in the middle of a quarter: 0 is above or left, 1 is below or right."""
    height, width = pixels.shape[:2]
    return tuple(pixels[height * (1 + 2 * vertical) // 4, width * (1 + 2 * horizontal) // 4])


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_picture_stored_without_loss_has_its_own_pixels_at_its_own_resolution():
    pictures = [patterned(seed, 96, 160) for seed in (1, 2)]
    pages = preprocessor().pages(open_pdf(photographed(*pictures)), [1, 2], VisionOptions(dpi=144))
    for own, picture in zip(pages, pictures, strict=True):
        assert own.size == (96, 160) and own.dpi == 144
        plain = preprocessor().image(picture, VisionOptions())
        assert np.array_equal(own.pixels, plain.pixels)
        assert (own.grid, own.tokens, own.digest) == (plain.grid, plain.tokens, plain.digest)


def test_what_is_not_painted_is_white():
    pixels = drawn(page(filled("0 0 1", "0 24 48 24")))
    assert [corner(pixels, y, x) for y in (0, 1) for x in (0, 1)] == [BLUE, WHITE, WHITE, WHITE]


@pytest.mark.parametrize(("turn", "where"), [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_a_turned_page_is_upright(turn, where):
    made = pdf(page(filled("0 0 1", "0 24 48 24"), more=f"/Rotate {turn}"))
    document = open_pdf(made)
    sides = (96, 48) if turn % 180 else (48, 96)
    assert document.points([1]) == [sides]
    pixels = document.drawn(1, sides)
    assert {(y, x): corner(pixels, y, x) == BLUE for y in (0, 1) for x in (0, 1)} == {
        (y, x): (y, x) == where for y in (0, 1) for x in (0, 1)
    }


def test_a_page_is_its_crop_box():
    made = pdf(page(f"{FULL} {filled('0 0 1', '48 0 48 48')}", more="/CropBox [48 0 96 48]"))
    assert open_pdf(made).points([1]) == [(48, 48)]
    assert np.unique(open_pdf(made).drawn(1, (48, 48)).reshape(-1, 3), axis=0).tolist() == [list(BLUE)]


def test_transparent_paint_lies_on_white():
    half = "<< /ExtGState << /half << /ca 0.5 >> >> >>"
    pixels = drawn(page(f"/half gs {FULL}", more=f"/Resources {half}"))
    assert np.abs(pixels[20, 20].astype(int) - (255, 128, 128)).max() <= 1


def test_annotations_are_drawn():
    form = f"<< /Type /XObject /Subtype /Form /BBox [0 0 96 48] /Length {len(FULL)} >>\nstream\n{FULL}\nendstream"
    note = "<< /Type /Annot /Subtype /Stamp /Rect [0 0 96 48] /F 4 /AP << /N 6 0 R >> >>"
    assert corner(drawn(page(more="/Annots [5 0 R]"), objects=[note, form]), 0, 0) == RED


def test_form_fields_are_drawn_with_what_was_filled_in():
    form = f"<< /Type /XObject /Subtype /Form /BBox [0 0 96 48] /Length {len(FULL)} >>\nstream\n{FULL}\nendstream"
    field = (
        "<< /Type /Annot /Subtype /Widget /FT /Btn /T (a) /Ff 0 /F 4 /Rect [0 0 96 48] /AS /Yes /V /Yes "
        "/AP << /N << /Yes 6 0 R >> >> >>"
    )
    made = pdf(page(more="/Annots [5 0 R]"), objects=[field, form])
    made = made.replace(b"/Type /Catalog", b"/Type /Catalog /AcroForm << /Fields [5 0 R] >>")
    red, green, _ = corner(open_pdf(made).drawn(1, (48, 96)), 0, 0)
    assert red > 200 > green


# --- sizes -----------------------------------------------------------------------------------------------------------


def sizes(box: str, most: int = 1 << 24, **options) -> tuple[tuple[int, int], int]:
    (own,) = preprocessor(most).pages(open_pdf(pdf(page(box=box))), [1], VisionOptions(**options))
    return own.size, round(own.dpi)


def test_a_page_has_144_pixels_an_inch_as_far_as_an_image_may_have_so_many():
    assert sizes("0 0 595 842") == ((1696, 1184), 145)
    assert sizes("0 0 595 842", dpi=72) == ((832, 608), 71)
    (height, width), dpi = sizes("0 0 595 842", 1 << 20)
    assert height * width <= 1 << 20 and dpi == 104
    (height, width), _ = sizes("0 0 595 842", max_pixels=200_000)
    assert 150_000 < height * width <= 200_000


def test_a_huge_page_is_no_larger_an_image_and_beyond_the_standard_refused():
    (height, width), _ = sizes(f"0 0 {MOST_POINTS} {MOST_POINTS}", 1 << 20)
    assert height * width <= 1 << 20
    document = open_pdf(pdf(page(), page(box="0 0 1000000000 100")))
    assert document.points([1]) == [(48, 96)]
    with refused("media_too_large", f"{MOST_POINTS:,}", "page 2"):
        document.points([1, 2])


def test_a_very_long_page_is_refused():
    with refused("aspect_ratio_exceeded"):
        sizes("0 0 14000 20")


def test_sizes_are_known_without_drawing(monkeypatch):
    document = open_pdf(pdf(page(), page(box="0 0 48 48")))
    monkeypatch.delattr(Document, "drawn")
    own = preprocessor().pages(document, [2, 1], VisionOptions())
    assert [item.size for item in own] == [(96, 96), (96, 192)] and "144 dpi" in str(own[0])


# --- which pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"), [(None, [1, 2, 3]), ("2", [2]), ("3,1", [3, 1]), ("2-3", [2, 3]), (" 2 - , 1", [2, 3, 1])]
)
def test_pages_are_chosen_by_numbers_and_ranges(text, numbers):
    assert open_pdf(pdf(page(), page(), page())).chosen(text) == numbers


@pytest.mark.parametrize("text", ["4", "2-4", "4-", "99999999999"])
def test_pages_that_are_not_there_are_refused_with_those_that_are(text):
    with refused("pages_invalid", "1 to 3"):
        open_pdf(pdf(page(), page(), page())).chosen(text)


@pytest.mark.parametrize("text", ["", ",", "1,", "0", "0-2", "1-0", "3-2", "-2", "1-2-3", "a", "1.5", "9" * 30, 2, [1]])
def test_a_choice_of_pages_that_is_none_is_refused(text):
    with refused("option_invalid", "pages"):
        open_pdf(pdf(page())).chosen(text)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_page_that_takes_too_long_is_refused_and_stops_nothing(tmp_path):
    (tmp_path / "a.pdf").write_bytes(nested(8, 10))
    with (tmp_path / "a.pdf").open("rb") as file:
        document = Document("a.pdf", file, seconds=1)
        assert document.points([1]) == [(48, 96)]
        with refused("document_too_slow", "1 seconds", "page 1 of a.pdf"):
            document.drawn(1, (48, 96))
    assert corner(drawn(page(FULL)), 0, 0) == RED


def test_a_pdf_that_ends_pdfium_is_refused_as_damaged(tmp_path, monkeypatch):
    document, crash = open_pdf(pdf(page())), tmp_path / "crash"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    with refused("media_damaged", "page 1", -signal.SIGSEGV):
        document.drawn(1, (48, 96))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "media_empty"),
        (b"\x89PNG\r\n\x1a\n", "media_not_opened"),
        (b"<html>", "media_not_opened"),
        (pdf(page())[:-20], "media_damaged"),
        (b"%PDF-1.7\n%%EOF", "media_damaged"),
        (pdf(), "media_damaged"),
        (locked(), "document_locked"),
        (3, "media_source_invalid"),
        ("/no/such.pdf", "media_not_found"),
    ],
    ids=["empty", "image", "web page", "cut short", "nothing in it", "no pages", "locked", "no source", "no file"],
)
def test_what_is_no_whole_readable_pdf_is_refused(data, code):
    with refused(code):
        open_pdf(data)


def test_a_page_that_is_not_there_is_told_by_its_number():
    made = pdf(page(), page()).replace(b"/Kids [3 0 R 5 0 R]", b"/Kids [3 0 R 9 0 R]")
    with refused("media_damaged", "page 2"):
        open_pdf(made).points([1, 2])


def test_the_name_of_a_file_counts_for_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(pdf(page(FULL)))
    assert open_pdf(tmp_path / "a.png").pages == 1
    (tmp_path / "b.pdf").write_bytes(b"GIF89a")
    with refused("media_not_opened", "b.pdf"):
        open_pdf(tmp_path / "b.pdf")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with refused("package_missing", "mlx-qwen35[pdf]"):
        open_pdf(pdf(page()))


# --- where it comes from ---------------------------------------------------------------------------------------------


def test_a_url_is_followed_as_an_image_s_is(server):
    url = server.sends("/a.pdf", pdf(page(FULL)), "application/pdf")
    with refused("url_refused"):
        open_pdf(url)
    assert corner(open_pdf(url, allow_private_urls=True).drawn(1, (48, 96)), 0, 0) == RED
    with refused("media_type_wrong", "image/png"):
        open_pdf(server.sends("/b.pdf", pdf(page(FULL)), "image/png"), allow_private_urls=True)


def test_a_document_needs_its_file_no_more(tmp_path):
    file = tmp_path / "a.pdf"
    file.write_bytes(pdf(page(FULL), page()))
    document = open_pdf(file)
    file.write_bytes(b"another")
    assert corner(document.drawn(2, (48, 96)), 0, 0) == WHITE and corner(document.drawn(1, (48, 96)), 0, 0) == RED


def test_threads_draw_the_pages_that_they_ask_for():
    document, found = open_pdf(pdf(page(FULL), page(filled("0 0 1")))), {}

    def draw(number: int) -> None:
        found[number] = {corner(document.drawn(number, (48, 96)), 0, 0) for _ in range(20)}

    threads = [threading.Thread(target=draw, args=[number]) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1: {RED}, 2: {BLUE}}
