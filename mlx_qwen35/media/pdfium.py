"""The process in which PDFium reads one PDF, see `Document`: run as a script, it answers a request and ends.

The request is JSON on standard input. file: descriptor of the PDF. seconds: after which SIGALRM ends the process.
pages: numbers from 1 on. size: (height, width) in which the only one of them is drawn, null to draw none. The answer is
the RGB bytes of the drawn page, or in JSON the number of pages and the (width, height) of those asked for, in points.
With exit status REFUSED it is PDFium's error in JSON: code, page and message.
"""

import json
import resource
import signal
import sys
from typing import Any

REFUSED = 3
MEMORY = 1 << 31  # bytes of address space, where the system holds a process to them (Linux)


def main() -> int:
    from pypdfium2 import PdfDocument, PdfiumError

    asked, page = json.load(sys.stdin), None
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a process that is inside PDFium too
    signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
    try:
        pdf = PdfDocument(open(asked["file"], "rb"))  # noqa: SIM115 (the process ends with it)
        pdf.init_forms()
        sizes = []
        for page in asked["pages"]:
            sizes.append(pdf.get_page_size(page - 1))
        if asked["size"] is None:
            answer = json.dumps([len(pdf), sizes]).encode()
        else:
            answer = draw(pdf, asked["pages"][0] - 1, *asked["size"])
    except PdfiumError as error:
        print(json.dumps([error.err_code, page, str(error)]))
        return REFUSED
    sys.stdout.buffer.write(answer)
    return 0


def draw(pdf: Any, index: int, height: int, width: int) -> Any:
    """What PdfPage.render does, at a size that need not have the page's ratio to the pixel."""
    from pypdfium2 import PdfBitmap, raw

    page = pdf[index]
    bitmap = PdfBitmap.new_native(width, height, raw.FPDFBitmap_BGR, rev_byteorder=True)
    bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
    place = bitmap, page, 0, 0, width, height, 0, raw.FPDF_ANNOT | raw.FPDF_REVERSE_BYTE_ORDER
    raw.FPDF_RenderPageBitmap(*place)
    if pdf.formenv:
        raw.FPDF_FFLDraw(pdf.formenv, *place)
    return bitmap.buffer


if __name__ == "__main__":
    sys.exit(main())
