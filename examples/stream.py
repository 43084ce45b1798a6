"""Print an answer while it is being written, without thinking."""

import sys

from mlx_qwen35 import load, stream_generate

model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
for piece in stream_generate(model, processor, prompt="Who are you?", enable_thinking=False):
    print(piece, end="", flush=True)
print()
