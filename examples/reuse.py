"""An earlier message is edited: what stands before it is not read again."""

import sys

from mlx_qwen35 import Conversation, load

model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
conversation = Conversation(model, processor, enable_thinking=False, temp=0, system_prompt="Answer in one short line.")


def ask(question: str) -> None:
    turn = conversation.send(question)
    print(f"{turn.text}   (prompt {turn.total} tokens, {turn.reused} of them reused)")


for question in ("What is 34 + 58?", "Add 10 to that."):
    ask(question)
del conversation.messages[3:]  # the second question and its answer
ask("Add 20 to that.")
print(conversation.library.counts)
