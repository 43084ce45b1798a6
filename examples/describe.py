"""Describe a picture, and ask for a detail of it."""

import sys
from pathlib import Path

from mlx_qwen35 import generate, load

picture = Path(__file__).parent / "pictures" / "shapes.png"
model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
for question in ("What do you see?", "What colour is the square?"):
    print(question, generate(model, processor, question, images=[picture], enable_thinking=False))
