"""Tables as text."""

from collections.abc import Container, Sequence


def align(table: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """Lines of a table. left: the columns that begin at their left end, as names do; figures end at the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = zip(range(len(row)), row, widths, strict=True)
        padded = [cell.ljust(width) if column in left else cell.rjust(width) for column, cell, width in cells]
        lines.append("  ".join(padded).rstrip())
    return lines


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def size(nbytes: int) -> str:
    """3.1 GB, of less than 0.1 GB in MB."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
