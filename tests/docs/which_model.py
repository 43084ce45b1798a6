"""README's table of models for Macs, computed from headers alone: python tests/docs/which_model.py

Memory and context are those of the memory plan. Decode is a bound: the memory bandwidth, divided by the bytes of one
token, which are the text weights (without an embedding that is not the output matrix) and the DeltaNet states, read
and written. Keys and values come on top. Nothing of this is measured.
"""

import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

from mlx_qwen35.budget.plan import loaded_bytes, mac, plan_memory, state_bytes
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry, is_float32
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.convert.planned import planned
from mlx_qwen35.convert.recipes import StorageOptions

# GB of memory, member of the family, recipe, and the chips that Macs with this memory are sold with.
ROWS = (
    (8, "2b", "8bit", ("M1",)), (8, "4b", "4bit", ("M1",)),
    (16, "4b", "8bit", ("M1", "M4", "Pro")), (16, "9b", "4bit", ("M1", "M4", "Pro")),
    (24, "9b", "8bit", ("M4",)), (32, "27b", "4bit", ("M4", "Pro", "Max")), (64, "27b", "8bit", ("Max",)),
)  # fmt: skip
CHIPS = {"M1": ("M1", 68), "M4": ("M4", 120), "Pro": ("M1, M2 Pro", 200), "Max": ("M1, M2 Max", 400)}  # GB/s
CONTEXT, PIXELS, LONGEST = 8192, 1 << 20, 262_144


def write_headers(folder: Path, config: dict[str, Any]) -> Path:
    """The published layout without its numbers: a header, and a hole behind it."""
    folder.mkdir(parents=True)
    parsed, header, end = parse_config(config), {}, 0
    assert parsed.vision
    for name, shape in (text_shapes(parsed.text) | vision_shapes(parsed.vision) | mtp_shapes(parsed.text)).items():
        start, end = end, end + math.prod(shape) * (4 if is_float32(name) else 2)
        header[name] = {"dtype": "F32" if is_float32(name) else "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def row(checkpoint: Checkpoint, gigabytes: int, name: str, recipe: str, sold: tuple[str, ...]) -> tuple[str, ...]:
    machine, text = mac(gigabytes), checkpoint.config.text
    plan = plan_memory(checkpoint, machine, CONTEXT, pixels=PIXELS)
    fitting = (n for n in (LONGEST >> i for i in range(9)) if plan_memory(checkpoint, machine, n).fits)
    moved = plan.weights + plan.state  # the plan has the states twice, as they are read and as they are written
    if not text.tie_word_embeddings:
        parts = [name for name in checkpoint.entries if ".embed_tokens." in name]
        moved -= loaded_bytes(checkpoint, parts, machine.dtype)
    assert plan.state == 2 * state_bytes(text, machine.dtype.size) and plan.image <= machine.limit
    speeds = (f"{1e9 * speed / moved:.0f}" if chip in sold else "–" for chip, (_, speed) in CHIPS.items())
    memory = f"{plan.image / 1e9:.1f} of {machine.limit / 1e9:.1f} GB"
    return f"{gigabytes} GB", f"{name.upper()}, `{recipe}`", memory, f"{next(fitting):,}", *speeds


def table() -> list[str]:
    """Lines of markdown."""
    first, *others = (name for name, _ in CHIPS.values())
    heads = ("Mac", "model, recipe", "memory", "context", f"tokens/s: {first}", *others)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources = {name: write_headers(root / name, geometry(name)) for name in dict.fromkeys(row[1] for row in ROWS)}
        rows = [
            row(planned(sources[name], StorageOptions(recipe)), gigabytes, name, recipe, sold)
            for gigabytes, name, recipe, sold in ROWS
        ]
    return [f"| {' | '.join(cells)} |" for cells in (heads, ("---",) * len(heads), *rows)]


if __name__ == "__main__":
    print(*table(), sep="\n")
