"""Compare two pictures in one question, each named in the message where it stands."""

import sys
from pathlib import Path

from mlx_qwen35 import generate, load

pictures = Path(__file__).parent / "pictures"
model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
for question in ("Are the two pictures the same?", "What does the second picture show?"):
    content = [
        {"type": "text", "text": "First picture: "},
        {"type": "image", "image": pictures / "shapes.png"},
        {"type": "text", "text": " Second picture: "},
        {"type": "image", "image": pictures / "triangle.png"},
        {"type": "text", "text": " " + question},
    ]
    result = generate(model, processor, messages=[{"role": "user", "content": content}])
    print(f"{question} {result}   ({result.reasoning})")
