"""Answer several prompts of different lengths together; each gets what it would get alone."""

import sys

from mlx_qwen35 import batch_generate, load

model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
questions = ["What is 7 + 5?", "Who are you?", "What is 12 + 30?"]
for question, result in zip(questions, batch_generate(model, processor, questions, enable_thinking=False), strict=True):
    print(f"{question} -> {result}")
