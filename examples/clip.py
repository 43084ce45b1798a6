"""Ask about a clip, and show which frames of it were read."""

import sys
from pathlib import Path

from mlx_qwen35 import load
from mlx_qwen35.engine.generation import start

clip = Path(__file__).parent / "pictures" / "moving.mp4"
model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
generation = start(model, processor, ["Which way does the circle move?"], videos=[clip], fps=2, enable_thinking=False)
media = generation.requests[0].prompt.media[0].media
print(f"{media}, at {', '.join(f'{seconds:.2f} s' for seconds in media.times)}")
for _, piece in generation:
    print(piece, end="", flush=True)
print()
