"""The commands of a chat, each declared once: /help, completion and the documents follow from the table."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.commands.output import print_media
from mlx_qwen35.commands.session import save
from mlx_qwen35.errors import InputError


@dataclass(frozen=True)
class Order:
    """One command. argument: how its argument is shown, "" without one. path: whether that is a file's name."""

    name: str
    help: str
    do: Callable[[Talk, str], None]
    argument: str = ""
    path: bool = False


def help_text() -> str:
    rows = [(f"/{order.name} {order.argument}".rstrip(), order.help) for order in ORDERS]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def find(name: str) -> Order:
    """The command of this name. InputError where there is none."""
    for order in ORDERS:
        if order.name == name:
            return order
    raise InputError("option_unknown", f"there is no command /{name}; /help lists them, // sends a slash")


def obey(talk: Talk, line: str) -> None:
    """Do what a line that begins with a slash says."""
    name, *rest = line.removeprefix("/").split(None, 1)
    argument = "".join(rest)
    order = find(name)
    if argument.strip() and not order.argument:
        raise InputError("option_unknown", f"/{name} takes nothing behind it, got {argument.strip()}")
    order.do(talk, argument.strip())


def _show(kind: str) -> Callable[[Talk, str], None]:
    """A command that adds a medium to the next message; one that cannot be read is refused now."""

    def add(talk: Talk, name: str) -> None:
        if not name:
            raise InputError("option_missing", f"/{kind} must name a file or URL")
        conversation = talk.conversation
        with talk.screen.step(f"reading {name}"):
            parts = conversation.processor.read_parts([{"type": kind, kind: unquoted(name)}], conversation.vision)
        print_media([parts[0][kind]], [part[part["type"]] for part in talk.media])
        talk.media += parts

    return add


def unquoted(name: str) -> str:
    """A file's name as it was typed, quoted, or dropped from the Finder, which escapes blanks."""
    try:
        words = shlex.split(name)
    except ValueError:
        return name
    return words[0] if len(words) == 1 else name


def _drop(talk: Talk, _: str) -> None:
    talk.media = []


def _reset(talk: Talk, _: str) -> None:
    talk.conversation.reset()
    talk.media = []


def _save(talk: Talk, _: str) -> None:
    if talk.session is None:
        raise InputError("option_missing", "/save needs --session FILE when the command starts; there is no file")
    save(talk.session)


def _exit(talk: Talk, _: str) -> None:
    talk.ended = True


def _help(talk: Talk, _: str) -> None:
    talk.screen.say(help_text())


ORDERS = (
    Order("image", "add an image to the next message; again for more", _show("image"), "FILE", path=True),
    Order("video", "add a video to the next message", _show("video"), "FILE", path=True),
    Order("drop", "remove what was added", _drop),
    Order("reset", "forget the conversation", _reset),
    Order("save", "write the conversation into the file of --session, as leaving does", _save),
    Order("exit", "leave (so does Ctrl-D)", _exit),
    Order("help", "this list", _help),
)
