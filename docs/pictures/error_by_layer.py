"""The errors of nano in 4 bit, layer by layer: python docs/pictures/error_by_layer.py

Converts nano by recipe 4bit with --eval on held-out lessons; the picture is the one that every conversion writes.
"""

import shutil
import tempfile
from pathlib import Path

from drawing import FOLDER
from encoding import Encoder
from tasks import items_of
from variants import LESSONS

from mlx_qwen35.convert import convert
from mlx_qwen35.convert.card import PLOT


def draw(path: Path, items: int = 3) -> None:
    encoder = Encoder()
    lessons = [item for task in LESSONS for item in items_of(task, False, items, 0)]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "lessons.txt"
        text.write_text("".join(f"{encoder.text(item)}{item.completion}<|im_end|>\n" for item in lessons))
        out = convert("nano", Path(folder) / "nano-4bit", recipe="4bit", evaluation=text)
        shutil.copy(out / PLOT, path)


if __name__ == "__main__":
    draw(FOLDER / PLOT)
