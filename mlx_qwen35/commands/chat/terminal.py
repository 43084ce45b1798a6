"""What a chat shows on a terminal: Markdown, dimmed reasoning, a spinner. rich is imported here and in markdown.py."""

import os
import re
import signal
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.control import ControlType
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text
from rich.theme import Theme

from mlx_qwen35.commands.chat.markdown import STYLES, blocks, rendered
from mlx_qwen35.commands.chat.screen import folded, statistics, summary, watched
from mlx_qwen35.commands.output import tell_cut
from mlx_qwen35.commands.session import tell_interrupted
from mlx_qwen35.console import notices
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.safe import safe
from mlx_qwen35.engine.conversation import Conversation, Turn
from mlx_qwen35.prompt.piece import ARGUMENTS, CALL, CALL_END, CONTENT, REASONING, Piece

PASTES, NO_PASTES = "\x1b[?2004h", "\x1b[?2004l"  # whether the terminal puts brackets around what is pasted
DIM = Style(dim=True)


class TerminalScreen:
    """Standard output as a terminal; errors go to standard error."""

    def __init__(self, hide_thinking: bool = False, verbose: bool = False):
        self._hide, self._verbose = hide_thinking, verbose
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        self._console = Console(theme=Theme(STYLES), **plain)
        self._errors = Console(stderr=True, **plain)
        self._answer: _Answer | None = None  # that comes now

    def say(self, text: str) -> None:
        self._console.print(Text(hung(safe(text), self._console.width)), soft_wrap=True)

    def fail(self, text: str) -> None:
        self._errors.print(Text(hung(safe(text), self._errors.width), "red"), soft_wrap=True)

    def note(self, text: str) -> None:
        if not notices.quiet():
            self._console.print(Text(hung(safe(text), self._console.width), DIM), soft_wrap=True)

    def opened(self) -> AbstractContextManager[None]:
        return quiet(self._resumed)

    def _resumed(self) -> None:
        if self._answer:
            self._answer.forget()

    def step(self, what: str, unit: str = "", timed: bool = False) -> Step:
        return Step(what, unit, timed)

    def answer(self, conversation: Conversation, turn: Turn) -> bool:
        self._answer = answer = _Answer(self._console)
        print(PASTES, end="", flush=True)
        with watched(turn, self) as step:
            try:
                for piece in folded(turn, step, self.note) if self._hide else turn:
                    step.end()
                    answer.add(piece)
            except KeyboardInterrupt:
                turn.cancel()
            finally:
                step.end()
                answer.end()
                self._answer = None
        if turn.result is None or not turn.result.tokens:
            tell_interrupted(conversation, turn)
            return False
        self.note(statistics(turn, turn.result) if self._verbose else summary(turn, turn.result))
        tell_cut(turn.result, conversation.model, "/reset begins anew")
        return True


def hung(text: str, width: int) -> str:
    """A text with its long lines broken between words, each going on under its second column, if it has one."""
    lines = []
    for line in text.split("\n"):
        column = re.match(r"\s*(\S+( \S+)*  +)?", line)
        indent = " " * (column.end() if column else 0)
        wrapper = textwrap.TextWrapper(width, "", indent, break_long_words=False, break_on_hyphens=False)
        lines += wrapper.wrap(line) if len(line) > width else [line]
    return "\n".join(lines)


class _Answer:
    """An answer as it comes: what grows is shown as it is, what is whole is rendered and stays."""

    def __init__(self, console: Console):
        self._console, self._region = console, _Region(console)
        self._kind, self._text = "", ""  # of what grows
        self._before = ""  # the kind of what was printed last

    def add(self, piece: Piece) -> None:
        kind = CALL if piece.kind in (ARGUMENTS, CALL_END) else piece.kind
        if kind != self._kind or piece.kind == CALL:
            self.end()
            self._kind = kind
        added = safe({CALL: f"{piece.name}(", CALL_END: ")"}.get(piece.kind, piece.text))
        self._text += added if self._text else added.lstrip("\n")
        for whole in self._whole(added):
            self._print(whole)
        self._region.show(self._rows(), DIM if kind == REASONING else Style())

    def end(self) -> None:
        for rest in blocks(self._text) if self._kind == CONTENT else [self._text.rstrip()]:
            self._print(rest)
        self._text = ""

    def forget(self) -> None:
        """Something else was written to the terminal."""
        self._region.forget()

    def _whole(self, added: str) -> list[str]:
        """What is whole of the text that grows, taken from it."""
        whole: list[str] = []
        if self._kind == REASONING:
            lines, end, last = self._text.rpartition("\n")
            if end and last.strip():
                whole, self._text = [lines], last
        elif self._kind == CONTENT:
            line = self._text.rpartition("\n")[2].lstrip()
            if "\n" in added or len(line) >= 4 > len(line) - len(added):  # 4 letters tell what kind of line it is
                *whole, self._text = blocks(self._text)
        return whole

    def _print(self, text: str) -> None:
        if not text.strip():
            return
        self._region.show([])
        if self._apart():
            self._console.line()
        self._before = self._kind
        if self._kind == CONTENT:
            self._console.print(rendered(self._console, text), soft_wrap=True, end="")
            self._console.line()
        else:
            self._console.print(Text(text, DIM if self._kind == REASONING else "bold"))

    def _apart(self) -> bool:
        """Whether a blank line comes before what grows."""
        return self._before != "" and (self._before, self._kind) not in ((REASONING, REASONING), (CALL, CALL))

    def _rows(self) -> list[str]:
        """The last lines of what grows, as many as the terminal holds."""
        width, height = self._console.width - 1, self._console.height - 1
        if not self._text.strip():
            return []
        lines = self._text.strip("\n").split("\n")[-height:]
        rows = [row.plain for line in lines for row in Text(line).wrap(self._console, width)]
        return ([""] * self._apart() + rows)[-height:]


class _Region:
    """The end of what the terminal shows, which is written over. Only the rows that have changed are drawn."""

    def __init__(self, console: Console):
        self._console = console
        self._rows: list[str] = []

    def show(self, rows: Sequence[str], style: Style | None = None) -> None:
        same = 0
        while same < min(len(rows), len(self._rows)) and rows[same] == self._rows[same]:
            same += 1
        up = sum(max(1, -(-cell_len(row) // self._console.width)) for row in self._rows[same:]) - 1
        back = "\r" + (f"\x1b[{up}A" if up > 0 else "") + "\x1b[J" if up >= 0 else "\n" if self._rows else ""
        self._rows = list(rows)
        if up >= 0 or rows[same:]:
            drawn = [Segment(back, None, [(ControlType.CLEAR,)]), Segment("\n".join(rows[same:]), style)]
            self._console.print(Segments(drawn), soft_wrap=True, end="")

    def forget(self) -> None:
        self._rows = []


@contextmanager
def quiet(resumed: Callable[[], None]) -> Iterator[None]:
    """What is typed in the block is shown by a prompt alone, and waits for one; what is pasted stays together.

    resumed: called when the process goes on after Ctrl-Z.
    """
    if not sys.stdin.isatty():
        yield
        return
    before, silent = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
    silent[3] = silent[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH  # Ctrl-C leaves what was typed

    def enter() -> None:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        print(PASTES, end="", flush=True)

    def leave() -> None:
        print(NO_PASTES, end="", flush=True)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def stop(*_: object) -> None:
        leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        enter()
        resumed()

    handler = signal.signal(signal.SIGTSTP, stop)
    enter()
    try:
        yield
    finally:
        leave()
        signal.signal(signal.SIGTSTP, handler)
