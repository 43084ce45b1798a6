"""A part with a PDF -> its pages, each of which is a text with its number, and an image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.pdf import Document, open_pdf
from mlx_qwen35.media.preprocess import Page
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.parts import source_of

TAGS = 2  # tokens around an image
Cut = Callable[[Document, Sequence[int], VisionOptions], list[Page]]


def open_pages(
    part: Mapping[str, Any], options: VisionOptions, cut: Cut, count: Callable[[str], int], window: int
) -> list[dict[str, Any]]:
    """The pages of the PDF that a part names. None is drawn yet.

    cut: document, numbers, options -> pages. count: text -> tokens. window: most tokens of a prompt.

    Raises InputError where it cannot be read, has no such pages, or its pages do not fit into the window.
    """
    source, own = source_of("pdf", part)
    wanted = own.pop("pages", None)
    options = replace(options, **own)
    document = open_pdf(source, options.allow_private_urls)
    pages = cut(document, document.chosen(wanted), options)
    _check_window(pages, count, window)
    return [new for page in pages for new in ({"type": "text", "text": label(page)}, {"type": "image", "image": page})]


def label(page: Page) -> str:
    """What stands before a page in a prompt."""
    return f"Page {page.number} of {page.document.pages}:"


def _check_window(pages: Sequence[Page], count: Callable[[str], int], window: int) -> None:
    used = 0
    for fit, page in enumerate(pages):
        used += count(label(page)) + TAGS + page.tokens
        if used >= window:
            raise InputError(
                "context_length_exceeded",
                f"the pages of a PDF must fit into the context of {window:,} tokens; of the {len(pages):,} of "
                f"{page.document.name} {fit:,} do, at {page.dpi:.0f} dpi. Choose fewer with {spelled('pages')}, or "
                f"show them smaller with a lower {spelled('dpi')}",
            )
