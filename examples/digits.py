"""Read a printed number from a picture that is given as a numpy array."""

import sys
from pathlib import Path

from mlx_qwen35 import generate, load, read_image

array = read_image(Path(__file__).parent / "pictures" / "number.png")  # (height, width, 3) uint8; a PIL image does too
model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
print(generate(model, processor, "Which number is printed?", images=[array], enable_thinking=False))
