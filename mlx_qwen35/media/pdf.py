"""A PDF document -> its pages, drawn one at a time by PDFium, at the size that is asked for.

A document keeps a copy of its file on disk, and the page that was drawn last. So memory does not grow with its pages,
and the file may change or go. PDFium works in a process of its own, see pdfium.py: no PDF can stop or end this one.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.media import pdfium
from mlx_qwen35.media.decoded import Size
from mlx_qwen35.media.fetch import MAX_BYTES, disk, fetch_file, is_remote, name_of
from mlx_qwen35.media.signatures import HEAD, IMAGES, identify
from mlx_qwen35.options import spelled
from mlx_qwen35.values import shown

if TYPE_CHECKING:
    Source = str | Path | bytes | bytearray | memoryview

DPI = 144  # two pixels a point, so that text of 10 points is 20 pixels high
POINTS = 72  # an inch
MOST_POINTS = 14_400  # of a side, as the PDF standard has it
SECONDS = 20  # of a process that draws a page, or reads the sizes of pages
_ENDS = 1024  # bytes at either end in which %PDF and %%EOF must be, as in Acrobat
_LOCKED = (4, 5)  # FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY
_RANGE = re.compile(r"\s*(\d+)\s*(-\s*(\d*)\s*)?")


class Document:
    """A PDF, see `open_pdf`. name: how messages call it. pages: how many it has; they count from 1.

    file: on a disk. seconds: that PDFium may take for a page.
    """

    def __init__(self, name: str, file: BinaryIO, seconds: float = SECONDS):
        self.name, self._file, self._seconds = name, file, seconds
        self._lock = threading.Lock()  # processes share the file's position
        weakref.finalize(self, file.close)
        self._last: tuple[tuple[int, Size], np.ndarray] | None = None
        self.pages: int = json.loads(self._asked(name))[0]

    def __repr__(self) -> str:
        return f"Document({self.name}, {self.pages:,} pages)"

    def chosen(self, pages: str | None) -> list[int]:
        """The numbers of the pages that a text such as "1-3,7,9-" chooses, in its order; None: all.

        Raises InputError option_invalid for another text, and pages_invalid for a page that is not there.
        """
        if pages is None:
            return list(range(1, self.pages + 1))
        found: list[int] = []
        for first, last in ranges(spelled("pages"), pages):
            last = self.pages if last is None else last
            if not first <= last <= self.pages:
                raise InputError(
                    "pages_invalid",
                    f"{spelled('pages')} must be within 1 to {self.pages}, as {self.name} has them, got {pages}",
                )
            found += range(first, last + 1)
        return found

    def points(self, numbers: Sequence[int]) -> list[tuple[float, float]]:
        """(height, width) of pages as they are shown, turned and cropped, in points. Nothing is drawn."""
        with self._lock:
            _, sizes = json.loads(self._asked(self.name, numbers))
        for number, (width, height) in zip(numbers, sizes, strict=True):
            if not max(width, height) <= MOST_POINTS:
                raise InputError(
                    "media_too_large",
                    f"a page of a PDF may have sides of at most {MOST_POINTS:,} points; page {number} of {self.name} "
                    f"is {width:,.0f} x {height:,.0f}. Print it to a smaller format, or leave it out with "
                    f"{spelled('pages')}",
                )
        return [(height, width) for width, height in sizes]

    def drawn(self, number: int, size: Size) -> np.ndarray:
        """(*size, 3) uint8 RGB: a page on white, with its annotations and form fields. The last one is kept."""
        with self._lock:
            if self._last is None or self._last[0] != (number, size):
                self._last = None  # makes room before the next is drawn
                pixels = self._asked(f"page {number} of {self.name}", [number], size)
                self._last = (number, size), np.frombuffer(pixels, np.uint8).reshape(*size, 3)
            return self._last[1]

    def _asked(self, what: str, pages: Sequence[int] = (), size: Size | None = None) -> bytes:
        """The answer of a process of its own, which may crash, and hang for so many seconds. what: in errors."""
        file = self._file.fileno()
        request = {"file": file, "seconds": self._seconds, "pages": list(pages), "size": size}
        command = [sys.executable, "-P", pdfium.__file__]  # -P: the modules beside it are not on its path
        done = subprocess.run(
            command, input=json.dumps(request).encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            pass_fds=[file], start_new_session=True,  # a terminal's Ctrl-C is for this process, which then ends it
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout
        if done.returncode == -signal.SIGALRM:
            raise InputError(
                "document_too_slow",
                f"a page of a PDF must be read within {self._seconds:g} seconds; {what} takes longer. Leave it out "
                f"with {spelled('pages')}, or print it into a new PDF",
            )
        if done.returncode != pdfium.REFUSED:
            raise _damaged(f"{what} ends PDFium (status {done.returncode})")
        code, page, message = json.loads(done.stdout)
        if page is not None:
            raise _damaged(f"page {page} of {self.name} cannot be read ({message})")
        if code in _LOCKED:
            raise InputError(
                "document_locked",
                f"a PDF must open without a password; {self.name} is encrypted. Save a copy without one, as by "
                "'qpdf --decrypt --password=... FILE COPY', or print it into a new PDF",
            )
        raise _damaged(f"{self.name} cannot be opened ({message})")


def open_pdf(source: "Source | Document", allow_private_urls: bool = False) -> Document:
    """A document, whose pages are drawn when their pixels are asked for.

    source: a path (~ is expanded), an http, https or data: URL, or a file's bytes; a document is given back.
        allow_private_urls: see `fetch`.

    Raises InputError if the package pypdfium2 is absent, or the source is no PDF, is cut short, damaged or encrypted.
    """
    if isinstance(source, Document):
        return source
    if importlib.util.find_spec("pypdfium2") is None:
        raise InputError("package_missing", "PDFs need the package pypdfium2: pip install 'mlx-qwen35[pdf]'")
    with _source(source, allow_private_urls) as (file, name):
        _check_ends(file, name)
        with disk("PDF"):
            copy = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (lives as long as the document)
            shutil.copyfileobj(file, copy)
            copy.flush()
    return Document(name, copy)


def ranges(name: str, pages: Any) -> list[tuple[int, int | None]]:
    """The first and the last page of each range of a text; None: to the end. name: of the option, in errors."""
    matches = [_RANGE.fullmatch(text) for text in pages.split(",")] if isinstance(pages, str) else [None]
    found = [(int(m[1]), _last(m)) for m in matches if m and len(m[0]) < 20]
    if len(found) < len(matches) or any(not 0 < first <= (first if last is None else last) for first, last in found):
        raise InputError(
            "option_invalid", f"{name} must be numbers from 1 on and ranges of them, as 1-3,7,9-; got {shown(pages)}"
        )
    return found


def _last(match: re.Match[str]) -> int | None:
    if not match[2]:
        return int(match[1])
    return int(match[3]) if match[3] else None


def check_pages(name: str, pages: Any) -> str:
    """InputError unless it is a text that chooses pages."""
    ranges(name, pages)
    return pages


@contextmanager
def _source(source: "Source", allow_private_urls: bool) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of a PDF, and how messages call it."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield BytesIO(source), f"a PDF given as {memoryview(source).nbytes:,} bytes"
        return
    if not isinstance(source, str | Path):
        raise InputError(
            "media_source_invalid", f"a PDF must be a path, a URL, a data: URI or bytes; got {type(source).__name__}"
        )
    name = name_of(str(source))
    if isinstance(source, str) and is_remote(source):
        with fetch_file(source, "pdf", allow_private_urls) as file:
            yield file, name
        return
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise InputError("media_not_found", f"a PDF must be a file or a URL; {name} {what}. Look at the path")
    try:
        with path.open("rb") as file:
            yield file, path.name
    except OSError as error:
        raise InputError("media_unreadable", f"{name} must be readable: {error.strerror}") from error


def _check_ends(file: BinaryIO, name: str) -> None:
    """The first and last bytes of a PDF, by which it is told from other files and from one that is cut short."""
    head = file.read(_ENDS)
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _ENDS))
    tail = file.read()
    file.seek(0)
    if not head:
        raise InputError("media_empty", f"a PDF must not be empty; {name} has no bytes. Copy or download it again")
    if b"%PDF-" not in head:
        kind = identify(head[:HEAD])
        hint = "Give it as an image" if kind in IMAGES else "Look at the path, or save it as PDF"
        raise InputError("media_not_opened", f"a PDF must begin with %PDF; {name} is {kind}. {hint}")
    if length > MAX_BYTES["pdf"]:
        raise InputError(
            "media_too_large", f"a PDF may have at most {MAX_BYTES['pdf']:,} bytes; {name} has {length:,}. Split it"
        )
    if b"%%EOF" not in tail:
        raise _damaged(f"{name} has no %%EOF at its end, so it is cut short")


def _damaged(what: str) -> InputError:
    return InputError("media_damaged", f"a PDF must be whole; {what}. Copy or download it again")
