"""Ask one question; show the thinking, the answer and the statistics apart."""

import sys

from mlx_qwen35 import generate, load

model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
result = generate(model, processor, prompt="What is 34 + 58?")
print("thinking:", result.reasoning)
print("answer:  ", result)
print(f"{result.generation_tokens} tokens at {result.generation_tps:.0f} a second, {result.peak_memory:.2f} GB at most")
