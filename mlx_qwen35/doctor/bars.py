"""Memory plans as stacked bars on a terminal: blocks in colours, or letters where there are none."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from mlx_qwen35.budget.parts import LABELS, parts
from mlx_qwen35.budget.plan import MemoryPlan

BLOCK, FREE, LIMIT = "█", "·", "|"
LETTERS = dict(zip(LABELS, "wvdaksm", strict=True))
COLOURS = dict(zip(LABELS, ("blue", "magenta", "cyan", "bright_blue", "green", "yellow", "red"), strict=True))


def coloured(console: Console) -> bool:
    """Whether bars are blocks in colours: not in a file or pipe, nor where NO_COLOR is set or blocks have no code."""
    return console.color_system is not None and not console.no_color and console.encoding.startswith("utf")


def bar(plan: MemoryPlan, width: int, blocks: bool) -> Text:
    """The parts of a plan and what is free up to the limit, which is marked: `width` characters stand for the larger.

    Each part ends where its share of the memory ends, to the nearest character. What is over the limit stands beyond
    the mark, with one character at least.
    """
    found, limit = parts(plan), plan.machine.limit
    scale = (width - 1) / max(limit, plan.image)  # the limit's mark takes one
    text, done = Text(), 0
    for label, nbytes in found:
        count = round(scale * (done + nbytes)) - round(scale * done)
        done += nbytes
        text.append((BLOCK if blocks else LETTERS[label]) * count, COLOURS[label] if blocks else "")
    text.append((FREE if blocks else ".") * (width - 1 - len(text)), "dim" if blocks else "")
    at = min(round(scale * limit), width - 1 - (plan.image > limit))
    return text[:at] + Text(LIMIT, "bold" if blocks else "") + text[at:]


def legend(plans: Sequence[MemoryPlan], blocks: bool, width: int) -> Text:
    """What the marks of these plans' bars stand for, in lines of at most `width` characters."""
    shown = [label for label in LABELS if any(dict(parts(plan))[label] for plan in plans)]
    marks = [(BLOCK if blocks else LETTERS[label], label, COLOURS[label] if blocks else "") for label in shown]
    marks.append((LIMIT, "limit of a model", "bold" if blocks else ""))
    text, used = Text(), 0
    for mark, label, style in marks:
        item = Text.assemble((mark, style), f" {label}")
        gap = "" if not used else "  " if used + 2 + len(item) <= width else "\n"
        used = len(item) + (used + 2 if gap == "  " else 0)
        text += Text(gap) + item
    return text
