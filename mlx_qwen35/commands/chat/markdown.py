"""Markdown of an answer, block by block, for a terminal: nothing that the model wrote is left out."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, cast

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.token import Comment, Generic, Keyword, Name, Number, String
from pygments.token import Token as Code
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, HorizontalRule, ListItem, Markdown, TableElement
from rich.segment import Segment, Segments
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.text import Text

# Without what would take text away: tags, escapes (LaTeX has \( and \{), and definitions of links, which are not shown.
# A line of dashes is a rule, and makes no heading of the line before it.
_PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_PARSER.disable(["html_block", "html_inline", "image", "entity", "escape", "reference", "lheading"])

# Readable on light and on dark.
STYLES = {
    **{f"markdown.h{level}": "bold" for level in range(2, 7)},
    "markdown.h1": "bold underline",
    "markdown.code": "cyan",
    "markdown.block_quote": "italic",
    "markdown.item.number": "none",
    "markdown.link": "none",
    "markdown.link_url": "underline",
    "markdown.table.border": "dim",
    "markdown.table.header": "bold",
}
_CODE = {
    Code: "", Comment: "dim", Keyword: "magenta", Name.Function: "bold", Name.Class: "bold", String: "green",
    Number: "cyan", Generic.Deleted: "red", Generic.Inserted: "green", Generic.Heading: "bold",
}  # fmt: skip
_THEME = ANSISyntaxTheme({kind: Style.parse(style) for kind, style in _CODE.items()})


def blocks(text: str) -> list[str]:
    """A text cut where its paragraphs, lists, tables and pieces of code begin. All but the last are whole."""
    lines = text.splitlines(keepends=True)
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map]
    cuts = [0, *starts[1:], len(lines)]
    return ["".join(lines[start:end]) for start, end in pairwise(cuts)]


def rendered(console: Console, block: str) -> RenderableType:
    """A block, to print with soft_wrap: long lines of code, and a paragraph with a word that fits into no line, are
    broken by the terminal alone, so that a copy of them is whole.
    """
    tokens = _PARSER.parse(block)
    for child in (child for token in tokens for child in token.children or ()):
        child.type = child.type.replace("softbreak", "hardbreak")
    if len(tokens) == 1 and tokens[0].type in ("fence", "code_block"):
        code = _highlighted(tokens[0].content, tokens[0].info)
        return Text("\n").join([Text(f"── {tokens[0].info}".rstrip(), "dim"), code, Text("──", "dim")])
    long = any(cell_len(word) > console.width for word in block.split())
    whole = long and bool(tokens) and tokens[0].type == "paragraph_open"
    return Segments(_trimmed(console, _Markdown(tokens), console.options.update(overflow="ignore" if whole else None)))


def _highlighted(code: str, language: str) -> Text:
    text = Syntax("", language.split(" ")[0] or "text", theme=_THEME).highlight(code.rstrip())
    text.rstrip()
    return text


def _trimmed(console: Console, renderable: RenderableType, options: ConsoleOptions) -> Iterable[Segment]:
    """Its lines without blank ones around them, and without the blanks that fill them up to the width."""
    lines = list(Segment.split_lines(console.render(renderable, options)))
    for line in lines:
        while line and not line[-1].text.strip():
            line.pop()
        line[-1:] = [Segment(last.text.rstrip(), last.style) for last in line[-1:]]
    filled = [number for number, line in enumerate(lines) if line]
    for number in range(filled[0], filled[-1] + 1) if filled else ():
        yield from [Segment.line()] * (number > filled[0]) + lines[number]


class _Heading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Code(CodeBlock):
    """Code inside a list or a quotation."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = _highlighted(str(self.text), self.lexer_name)
        text.no_wrap, text.overflow = False, "fold"
        yield text


class _Item(ListItem):
    def render_number(self, console: Console, options: ConsoleOptions, number: Any, last_number: Any) -> RenderResult:
        return super().render_number(console, options, cast(int, f"{number}."), cast(int, f"{last_number}."))


class _Rule(HorizontalRule):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("───", "dim")


class _Table(TableElement):
    """A table whose cells are broken where they are too narrow for a word."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            columns: Any = getattr(table, "columns", ())
            for column in columns:
                column.overflow = "fold"
            yield table


class _Markdown(Markdown):
    elements = Markdown.elements | {
        "heading_open": _Heading, "fence": _Code, "code_block": _Code, "hr": _Rule, "table_open": _Table,
        "list_item_open": _Item,
    }  # fmt: skip

    def __init__(self, tokens: list[Token]):
        super().__init__("", hyperlinks=False)
        self.parsed = tokens
