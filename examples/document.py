"""Turn a PDF into Markdown, page by page: each page is a prompt of its own, so memory does not grow with the pages.

What is in FILE.md already is not read again: a run that was stopped goes on behind its last whole page.
"""

import argparse
import sys
import time
from pathlib import Path

from mlx_qwen35 import Document, generate, load, open_pdf

PDF = Path(__file__).parent / "pictures" / "shapes.pdf"
TASK = (
    "Write what is on this page as Markdown: headings, paragraphs, lists and tables as they are printed, formulas as "
    "LaTeX. Describe each picture in a sentence. Write nothing else."
)
OF_NANO = "What do you see?"  # which it was trained to answer


def mark(document: Document, page: int) -> str:
    """What stands behind a page that is whole."""
    return f"<!-- {document.name}, page {page} of {document.pages} -->\n\n"


def begun(out: Path, document: Document) -> set[int]:
    """The pages that a file holds whole. What is behind the last of them, of a run that was killed, is cut off."""
    text = out.read_text(encoding="utf-8") if out.exists() else ""
    marks = {page: text.find(mark(document, page)) for page in range(1, document.pages + 1)}
    done = {page: at + len(mark(document, page)) for page, at in marks.items() if at >= 0}
    out.write_text(text[: max(done.values(), default=0)], encoding="utf-8")
    return set(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("file", nargs="?", default=PDF, metavar="FILE", help="the PDF")
    parser.add_argument("--pages", metavar="PAGES", help="as 1-3,7,9- (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="where the text goes (default: standard output)")
    parser.add_argument("--task", metavar="TEXT", help="what to do with each page (default: write it as Markdown)")
    parser.add_argument("--dpi", type=int, metavar="N", help="pixels per inch (default: 144, as memory allows)")
    args = parser.parse_args()
    document = open_pdf(args.file)
    pages = document.chosen(args.pages)
    done = begun(args.out, document) if args.out else set()
    model, processor = load(args.model)
    task = args.task or (OF_NANO if args.model == "nano" else TASK)
    for page in pages:
        if page in done:
            continue
        began = time.monotonic()
        result = generate(
            model, processor, task, pdfs=[document], pages=str(page), dpi=args.dpi, enable_thinking=False, temp=0,
            max_tokens=4096, loop_guard=True,
        )  # fmt: skip
        cut = "" if result.finish_reason == "stop" else f", cut short ({result.finish_reason})"
        told = f"page {page} of {document.pages}: {result.generation_tokens} tokens in {time.monotonic() - began:.1f} s"
        print(told + cut, file=sys.stderr, flush=True)
        text = f"{result.text.strip()}\n\n{mark(document, page)}"
        if args.out:
            with args.out.open("a", encoding="utf-8") as out:
                out.write(text)
        else:
            print(text, end="", flush=True)


if __name__ == "__main__":
    main()
