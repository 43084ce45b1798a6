"""The loop of a chat over messages and commands."""

from typing import Any

from mlx_qwen35.commands.chat.orders import obey
from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.errors import InputError


def run(talk: Talk) -> None:
    """Read and do until /exit or the end of input; what goes wrong is told, and the talk goes on."""
    while not talk.ended:
        try:
            text, talk.text = talk.text, ""
            line = talk.reader.read(text, talk.attached)
            if line is None:
                return
            if line:
                take(talk, line)
        except InputError as error:
            talk.screen.fail(f"error: {error} [{error.code}]")
        except KeyboardInterrupt:
            talk.screen.fail("interrupted")


def take(talk: Talk, line: str) -> None:
    """Do what a message or a command says. A message that begins with // sends one slash."""
    if line.startswith("/") and not line.startswith("//"):
        obey(talk, line)
        return
    text = line.removeprefix("/") if line.startswith("//") else line
    content: Any = [*talk.media, {"type": "text", "text": text}] if talk.media else text
    if talk.show(talk.conversation.send(content)):
        talk.media = []
