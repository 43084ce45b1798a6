"""Two turns, the second about the first; only what is new is prefilled."""

import sys

from mlx_qwen35 import load
from mlx_qwen35.engine.conversation import Conversation

model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
conversation = Conversation(model, processor, enable_thinking=False)
for question in ("What is 34 + 58?", "Add 10 to that."):
    print(">>", question)
    turn = conversation.send(question)
    for piece in turn:
        print(piece, end="", flush=True)
    print(f"\n   (prompt {turn.total} tokens, {turn.reused} of them reused)")
