"""What a chat is at any moment."""

from collections import Counter
from typing import Any

from mlx_qwen35.commands.chat.reader import Reader
from mlx_qwen35.commands.chat.screen import Screen
from mlx_qwen35.engine.conversation import Conversation, Turn
from mlx_qwen35.engine.session import Session


class Talk:
    """A conversation, and what goes with its next message.

    media: parts (images, videos) that go with the next message. session: the file of the conversation, if one is open.
    text: what the next read begins with, as /edit has it. ended: whether /exit was typed.
    """

    def __init__(self, conversation: Conversation, reader: Reader, screen: Screen, session: Session | None = None):
        self.conversation, self.reader, self.screen, self.session = conversation, reader, screen, session
        self.media: list[dict[str, Any]] = []
        self.text, self.ended = "", False

    @property
    def attached(self) -> str:
        """What goes with the next message, in words."""
        counts = Counter(part["type"] for part in self.media)
        return ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items())

    def show(self, turn: Turn) -> bool:
        """Answer: run a turn to its end; False where it has no token."""
        return self.screen.answer(self.conversation, turn)
