"""A recording of nano in a terminal, as an animated SVG: python docs/pictures/recording.py

Drives a real terminal (tmux), captures its screen with its colours, and writes recording.svg, which needs no script and
which GitHub shows. The times between frames are those of the recording, except for long waits, which are cut.
"""

import io
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from drawing import FOLDER, ROOT
from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

sys.path.append(str(ROOT / "tests"))

from terminal import Terminal

COLUMNS, ROWS = 80, 20
ADVANCE, LINE, SIZE, MARGIN, BAR = 8.4, 18, 14, 16, 30  # pixels: of a letter, a line, the font, around, the title bar
STEP, LONGEST, LAST = 0.08, 1.2, 4.0  # seconds: between two looks, of a wait, of the last frame
THEME = TerminalTheme(
    (13, 17, 23), (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34),
     (88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)],
    [(110, 118, 129), (255, 161, 152), (86, 211, 100), (227, 179, 65),
     (121, 192, 255), (210, 168, 255), (86, 212, 221), (255, 255, 255)],
)  # fmt: skip
FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace"
CONSOLE, DOTS = Console(file=io.StringIO(), width=COLUMNS), ("#ff5f57", "#febc2e", "#28c840")


@dataclass(frozen=True)
class Frame:
    """A screen with its escape sequences, and for how long it stood."""

    screen: str
    seconds: float


def play(terminal: Terminal) -> None:
    """What is typed: an image to generate, then a conversation."""
    _type(terminal, 'mlx_qwen35 generate --model nano --image two.png --prompt "What do you see?"', "Peak memory")
    _type(terminal, "clear", "", pause=0.2)
    _type(terminal, "mlx_qwen35 chat --model nano", "/help")
    _type(terminal, "What is 34 + 58?", "92")
    _type(terminal, "Add 10 to that.", "102")
    _type(terminal, "/image two.png", "with 1 image")
    _type(terminal, "What do you see?", "blue square")
    _type(terminal, "/exit", "$")


def _type(terminal: Terminal, text: str, awaited: str, pause: float = 1.0) -> None:
    seen = terminal.screen(history=True).count(awaited) if awaited else 0
    for letter in text:
        terminal.type(letter, enter=False)
        time.sleep(0.04)
    time.sleep(0.3)
    terminal.keys("Enter")
    terminal.wait(awaited, count=seen + (awaited in text) + 1)
    time.sleep(pause)


def record(play: Callable[[Terminal], None], size: tuple[int, int] = (COLUMNS, ROWS)) -> list[Frame]:
    """Look at the screen while it is played on: a frame for each screen that differs from the one before."""
    screens: list[tuple[float, str]] = []
    shell = ["bash", "--norc", "--noprofile", "-i"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PS1": "\\[\\e[32m\\]$\\[\\e[0m\\] ", "PATH": path}
    with tempfile.TemporaryDirectory() as home:
        shutil.copy(ROOT / "examples/pictures/shapes.png", Path(home, "two.png"))
        with Terminal(shell, Path(home), size, environment) as terminal, ThreadPoolExecutor(1) as pool:
            terminal.wait("$")
            playing = pool.submit(play, terminal)
            while not playing.done():
                screen = terminal.screen(colours=True)
                if not screens or screens[-1][1] != screen:
                    screens.append((time.monotonic(), screen))
                time.sleep(STEP)
            playing.result()
    times = [at for at, _ in screens]
    seconds = [min(after - at, LONGEST) for at, after in itertools.pairwise(times)]
    return [Frame(screen, stood) for (_, screen), stood in zip(screens, [*seconds, LAST], strict=True)]


def draw(frames: Sequence[Frame], size: tuple[int, int] = (COLUMNS, ROWS)) -> str:
    """An SVG that shows the frames one after the other, for ever: a film, of which a window shows one frame.

    A line that stands in several frames is written once. Who asked for less motion sees the last frame.
    """
    width, height = round(size[0] * ADVANCE + 2 * MARGIN), size[1] * LINE + 2 * MARGIN + BAR
    lines: dict[str, int] = {}
    film, moves, start, whole = "", "", 0.0, sum(frame.seconds for frame in frames)
    for number, frame in enumerate(frames):
        moves += f"{100 * start / whole:.2f}%{{transform:translateY({-height * number}px)}}"
        start += frame.seconds
        film += f'<g transform="translate(0 {height * number})">'
        for row, text in enumerate(AnsiDecoder().decode(frame.screen)):  # whose colours go on from line to line
            if line := _line(text):
                film += f'<use href="#l{lines.setdefault(line, len(lines))}" y="{LINE * row}"/>'
        film += "</g>"
    style = (
        f"@keyframes f{{{moves}}}.f{{animation:f {whole:.2f}s step-end infinite}}text{{white-space:pre}}"
        f"@media(prefers-reduced-motion){{.f{{animation:none;transform:translateY({-height * (len(frames) - 1)}px)}}}}"
    )
    known = "".join(f'<g id="l{number}">{line}</g>' for line, number in lines.items())
    dots = "".join(f'<circle cx="{20 + 20 * i}" cy="18" r="6" fill="{colour}"/>' for i, colour in enumerate(DOTS))
    look = f'font-family="{FONTS}" font-size="{SIZE}" fill="{THEME.foreground_color.hex}"'
    ground = f'x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" fill="{THEME.background_color.hex}"'
    window = f'x="{MARGIN}" y="{MARGIN + BAR}" width="{width - 2 * MARGIN}" height="{height - 2 * MARGIN - BAR}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {look}>\n<style>{style}</style>\n'
        f'<defs>{known}</defs>\n<rect {ground} stroke="#30363d"/>'
        f'{dots}\n<svg {window}><g class="f">{film}</g></svg>\n</svg>\n'
    )


def _line(line: Text) -> str:
    """The letters of a line by their looks, each run as wide as its cells."""
    parts, at = [], 0
    for segment in line.render(CONSOLE):
        cells = segment.cell_length
        if segment.text.strip():
            place = f'x="{at * ADVANCE:.1f}" y="{SIZE}" textLength="{cells * ADVANCE:.1f}"'
            parts.append(f"<text {place}{_look(segment.style or Style())}>{escape(segment.text)}</text>")
        at += cells
    return "".join(parts)


def _look(style: Style) -> str:
    look = f' fill="{style.color.get_truecolor(THEME).hex}"' if style.color and not style.color.is_default else ""
    look += ' font-weight="bold"' if style.bold else ""
    look += ' font-style="italic"' if style.italic else ""
    return look + (' opacity=".6"' if style.dim else "")


if __name__ == "__main__":
    (FOLDER / "recording.svg").write_text(draw(record(play)), encoding="utf-8")
