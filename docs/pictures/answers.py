"""nano's answers beside its pictures, right and wrong: python docs/pictures/answers.py [--measure], see drawing.py

Held-out items, greedy answers without thinking. Above stand items that are answered right, below wrong ones.
"""

from itertools import product
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from drawing import machine, main
from ours import completions
from PIL import Image, ImageOps
from tasks import Item, items_of

from mlx_qwen35 import load
from mlx_qwen35.console import plot

TASKS = ("describe", "count", "colour", "digits", "which_picture", "direction")
SIDE = 66  # pixels: of a picture in its frame


def measure(items: int = 40) -> dict[str, Any]:
    """Counts of each task, and of each the first right and the first wrong answer."""
    model, processor = load("nano")
    right, shown = {}, []
    for task in TASKS:
        asked = items_of(task, False, items, 0)
        answers = completions(model, processor, asked)
        marks = [answer == item.completion for answer, item in zip(answers, asked, strict=True)]
        right[task] = sum(marks)
        for mark in set(marks):
            index = marks.index(mark)
            shown.append({"task": task, "index": index, "answer": answers[index], "right": mark})
    return {"machine": machine(), "items": items, "right": right, "shown": shown}


def draw(path: Path, figures: dict[str, Any]) -> plot.Figure:
    items, counts = figures["items"], figures["right"]
    title = f"nano answers {sum(counts.values())} of {items * len(TASKS)} held-out questions about pictures right"
    note = f"{items} questions of each kind: of each the first that was answered right, and the first that was not.\n"
    note += f"Greedy, without thinking. {figures['machine']}."
    cells = {(answer["right"], answer["task"]): answer for answer in figures["shown"]}
    with plot.picture(path, title, note, 5.0, len(TASKS), rows=2) as (figure, panels):
        for axes, place in zip(panels, product((True, False), TASKS), strict=True):
            axes.set_axis_off()
            answer = cells.get(place)
            if answer is None:
                plot.label(axes, f"{'none of' if place[0] else 'all'} {items} right", 0.5, 0.5, (0, 0), va="center")
            else:
                _show(axes, items_of(answer["task"], False, items, 0)[answer["index"]], answer)
        for axes, task in zip(panels, TASKS, strict=False):
            axes.set_title(f"{counts[task]} of {items}", loc="center")
    return figure


def _show(axes: plot.Axes, item: Item, answer: dict[str, Any]) -> None:
    """The picture, below it the question, the answer, and the right one where that is another."""
    parts = item.messages[-1]["content"]
    pictures = [part["image"] for part in parts if part["type"] == "image"]
    pictures += [frame for part in parts if part["type"] == "video" for frame in part["video"]]
    axes.imshow(_together(pictures))
    question = next(part["text"] for part in parts if part["type"] == "text")
    mark, colour = ("✓", plot.GREEN) if answer["right"] else ("✗", plot.ORANGE)
    texts = [(question, plot.GREY, "normal"), (f"{mark} {answer['answer']}", colour, "bold")]
    texts += [] if answer["right"] else [(f"right: {item.completion}", plot.GREY, "normal")]
    down = 5
    for text, ink, weight in texts:
        lines = wrap(text, 20)
        look = {"xycoords": "axes fraction", "va": "top", "color": ink, "weight": weight}
        plot.label(axes, "\n".join(lines), 0.5, 0, (0, -down), **look)
        down += 3 + 10 * len(lines)


def _together(pictures: list[Image.Image]) -> np.ndarray:
    """One in a frame, or several, two in a row, at the bottom of a square."""
    framed = [ImageOps.expand(picture, 1, plot.LINE) for picture in pictures]
    columns = min(2, len(framed))
    page = Image.new("RGB", (SIDE * columns, SIDE * columns), plot.PAPER)
    for i, picture in enumerate(reversed(framed)):
        page.paste(picture, (SIDE * (columns - 1 - i % 2), SIDE * (columns - 1 - i // 2)))
    return np.asarray(page)


if __name__ == "__main__":
    main(__file__, measure, draw)
