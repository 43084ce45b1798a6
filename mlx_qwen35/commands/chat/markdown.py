"""Markdown of an answer, block by block, for a terminal: nothing that the model wrote is left out."""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block.state_block import StateBlock
from markdown_it.rules_block.table import escapedSplit, getLine, table
from markdown_it.rules_inline.state_inline import StateInline
from markdown_it.token import Token
from pygments.token import Comment, Generic, Keyword, Name, Number, String
from pygments.token import Token as Code
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, HorizontalRule, ListElement, ListItem, Markdown, TableElement
from rich.segment import Segment, Segments
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.text import Text

_OPERAND, _NEXT_OPERAND = re.compile(r"[0-9A-Za-z)\]}]"), re.compile(r"[0-9A-Za-z(\[{]")


def _as_written(state: StateInline, silent: bool) -> bool:
    """Stars between operands are no emphasis, as in 2*3*4, nor are two underscores, as in __init__."""
    run = re.compile(r"\*+|_+|~+").match(state.src, state.pos, state.posMax)
    if not run:
        return False
    inside = _OPERAND.match(state.src, run.start() - 1) if run.start() else None
    if not (inside and _NEXT_OPERAND.match(state.src, run.end())) and run[0][:2] != "__":
        return False
    state.pos = run.end()
    if not silent:
        state.pending += run[0]
    return True


def _whole_table(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A table none of whose rows has more cells than columns: Markdown would leave those out."""
    before, line = len(state.tokens), state.line
    if not table(state, start, end, silent):
        return False
    columns = sum(token.type == "th_open" for token in state.tokens[before:])
    if silent or not any(len(_cells(state, row)) > columns for row in range(start + 2, state.line)):
        return True
    del state.tokens[before:]
    state.line = line
    return False


def _cells(state: StateBlock, row: int) -> list[str]:
    """The cells of a row but for empty ones at its end."""
    text = getLine(state, row).strip().removeprefix("|")
    cells = [cell.strip() for cell in escapedSplit(text)]
    while cells and not cells[-1]:
        cells.pop()
    return cells


# Without what would take text away: tags, escapes (LaTeX has \( and \{), and definitions of links, which are not shown.
# A line of dashes is a rule, and makes no heading of the line before it.
_PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_PARSER.disable(["html_block", "html_inline", "image", "entity", "escape", "reference", "lheading"])
_PARSER.inline.ruler.before("strikethrough", "as_written", _as_written)
_PARSER.block.ruler.at("table", _whole_table, {"alt": ["paragraph", "reference"]})

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
        if title := child.attrs.get("title"):
            child.attrs["href"] = f'{child.attrs["href"]} "{title}"'
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
    number = ""  # as it was written

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> "_Item":
        item = cls()
        item.number = f"{token.info}{token.markup}"
        return item


class _List(ListElement):
    """A list that keeps its numbers."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        numbers: Any = [getattr(item, "number", "") for item in self.items]
        for item, number in zip(self.items, numbers, strict=True):
            if self.list_type == "bullet_list_open":
                yield from item.render_bullet(console, options)
            else:
                yield from item.render_number(console, options, number, max(numbers, key=len))


class _Rule(HorizontalRule):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("───", "dim")


class _Table(TableElement):
    """A table whose cells are broken where they are too narrow for a word."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in super().__rich_console__(console, options):
            columns: Any = getattr(part, "columns", ())
            for column in columns:
                column.overflow = "fold"
            yield part


class _Markdown(Markdown):
    elements = Markdown.elements | {
        "heading_open": _Heading, "fence": _Code, "code_block": _Code, "hr": _Rule, "table_open": _Table,
        "list_item_open": _Item, "ordered_list_open": _List, "bullet_list_open": _List,
    }  # fmt: skip

    def __init__(self, tokens: list[Token]):
        super().__init__("", hyperlinks=False)
        self.parsed = tokens
