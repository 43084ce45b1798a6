"""The tasks of the bundled nano model: generators of questions with their exact answers.

Every task draws its items from a seeded `random.Random`, so one seed names one item for ever. A tenth of all items
is held out of the training: the crc32 of an item's key decides. Tests and the evaluation draw from that tenth:

    item = draw("add_2", random.Random(7), thinking=True)
    item.messages, item.completion, item.answer

A picture is a 64 x 64 RGB `PIL.Image`, a clip a list of such pictures with its frame rate.
"""

from tasks.clips import sample_indices, timestamps
from tasks.drawing import AGENT_TASKS, ALL_TASKS, TASKS, draw, draw_lesson, items_of
from tasks.figures import COLOURS
from tasks.items import Clip, Item, Turn, completion, is_held_out

__all__ = [
    "AGENT_TASKS", "ALL_TASKS", "COLOURS", "TASKS", "Clip", "Item", "Turn", "completion", "draw", "draw_lesson",
    "is_held_out", "items_of", "sample_indices", "timestamps",
]  # fmt: skip
