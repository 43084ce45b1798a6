"""A second question about a picture: it is not encoded again."""

import sys
from pathlib import Path

from mlx_qwen35 import load
from mlx_qwen35.engine.conversation import Conversation

picture = Path(__file__).parent / "pictures" / "triangle.png"
model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
conversation = Conversation(model, processor, enable_thinking=False)
for content in (
    [{"type": "image", "image": picture}, {"type": "text", "text": "What shape is it?"}],
    "And what colour is it?",
):
    turn = conversation.send(content)
    print(f"{turn.text}   (prompt {turn.total} tokens, {turn.reused} of them reused)")
