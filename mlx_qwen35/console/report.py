"""Words of a report in Markdown."""

from pathlib import Path

MOST_SHOWN = 400  # characters of a question or an answer


def last(source: str) -> str:
    """A Hugging Face id as it is, of a path its last part: a report tells no folders of this machine."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() or source.count("/") != 1 else source


def quoted(text: str, most: int = MOST_SHOWN) -> str:
    """A text as code on one line, with its beginning if it has more than `most` characters."""
    line = text.replace("\n", "⏎")
    line = line if len(line) <= most else f"{line[:most]}…"
    fence = "``" if "`" in line else "`"
    return f"{fence} {line} {fence}" if fence == "``" else f"`{line}`" if line else "(nothing)"
