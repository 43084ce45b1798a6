"""The loop of a chat over messages and commands."""

from mlx_qwen35.commands.chat.attach import attach, dropped
from mlx_qwen35.commands.chat.orders import COMMAND, obey
from mlx_qwen35.commands.chat.reader import Unreadable
from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.errors import InputError


def run(talk: Talk) -> None:
    """Read and do until /exit or the end of input; what goes wrong is told, and the talk goes on.

    Raises Unreadable.
    """
    talk.ask()  # a session may end with calls
    while not talk.ended:
        try:
            line = talk.reader.read(talk.text, talk.attached)
            if line is None:
                talk.leave()
            else:
                take(talk, line)
        except Unreadable:
            raise
        except InputError as error:
            talk.screen.fail(f"error: {error} [{error.code}]")
        except KeyboardInterrupt:
            talk.screen.fail("interrupted")
            talk.abandon()


def take(talk: Talk, line: str) -> None:
    """Do what a line says. A message that begins with // sends one slash; files that are dropped are added."""
    if not line:
        talk.abandon()
    elif parts := dropped(line):
        attach(talk, parts, line)
    elif command := COMMAND.fullmatch(line):
        obey(talk, command["name"], command["argument"] or "")
    else:
        talk.take(line.removeprefix("/") if line.startswith("//") else line)
