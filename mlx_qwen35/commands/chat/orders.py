"""The commands of a chat, each declared once: /help, completion and the documents follow from the table."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_qwen35.commands.chat import attach, files, info, settings, turns
from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.errors import InputError


@dataclass(frozen=True)
class Order:
    """One command.

    group: its heading in /help. argument: how its argument is shown, "" without one. path: whether that is a file's
    name. choices: the words that may come next, of what stands before them, for completion.
    """

    group: str
    name: str
    help: str
    do: Callable[[Talk, str], None]
    argument: str = ""
    path: bool = False
    choices: Callable[[str], Sequence[str]] = lambda before: ()


# A slash, and no other in the first word: that would be a path, in a message.
COMMAND = re.compile(r"/(?P<name>[^/\s]*)(\s+(?P<argument>.*))?", re.DOTALL)


def help_text() -> str:
    """The commands under their headings, in 80 columns."""
    shown = {order.name: f"/{order.name} {order.argument}".rstrip() for order in ORDERS}
    width = max(map(len, shown.values()))
    lines: list[str] = []
    for group in dict.fromkeys(order.group for order in ORDERS):
        lines.append(f"{group}:")
        lines += [f"  {shown[order.name]:{width}}  {order.help}" for order in ORDERS if order.group == group]
    return "\n".join([*lines, "//TEXT sends a message that begins with a slash."])


def find(name: str) -> Order:
    """The command of this name. InputError where there is none."""
    for order in ORDERS:
        if order.name == name:
            return order
    nearest = difflib.get_close_matches(name, [order.name for order in ORDERS], n=1)
    meant = f"; did you mean /{nearest[0]}?" if nearest else ""
    raise InputError("option_unknown", f"there is no command /{name}{meant}; /help lists them, // sends a slash")


def obey(talk: Talk, name: str, argument: str = "") -> None:
    """Do what a command says."""
    order, argument = find(name), argument.strip()
    if argument and not order.argument:
        raise InputError("option_unknown", f"/{name} takes nothing behind it, got {argument}")
    order.do(talk, argument)


def _exit(talk: Talk, _: str) -> None:
    talk.leave()


def _help(talk: Talk, _: str) -> None:
    talk.screen.say(help_text())


def _words(*words: str) -> Callable[[str], Sequence[str]]:
    return lambda before: () if before else words


_NEXT, _BACK, _HOW, _HELD = "With the next message", "Go back", "How it answers", "The conversation"
ORDERS = (
    Order(_NEXT, "image", "add images: files or URLs", attach.add("image"), "FILE ...", path=True),
    Order(_NEXT, "video", "add videos", attach.add("video"), "FILE ...", path=True),
    Order(_NEXT, "pdf", "add the pages of a PDF, as 1-3 or 1,4", attach.add_document, "FILE [PAGES]", path=True),
    Order(_NEXT, "paste", "add the image in the clipboard", attach.paste),
    Order(_NEXT, "drop", "remove what was added", attach.drop),
    Order(_BACK, "retry", "another answer, with the next seed or this one", turns.retry, "[SEED]"),
    Order(_BACK, "undo", "take back the last question and its answer", turns.undo),
    Order(_BACK, "edit", "put the last message into the input again", turns.edit),
    Order(_BACK, "reset", "forget the conversation; its file keeps it", turns.reset),
    Order(
        _HOW, "system", "show, set or remove the system prompt", settings.system, "[TEXT|off]",
        choices=_words("off"),
    ),
    Order(
        _HOW, "think", "think before answering, within N tokens", settings.think, "[on|off|N]",
        choices=_words("on", "off"),
    ),
    Order(
        _HOW, "set", "show all options, or set one", settings.set_or_show, "[OPTION VALUE]",
        choices=settings.completions,
    ),
    Order(
        _HOW, "tools", "show, load or remove functions to call", settings.tools, "[FILE|off]", path=True,
        choices=_words("off"),
    ),
    Order(_HELD, "save", "write it into its file, or begin a file", files.save, "[FILE]", path=True),
    Order(_HELD, "load", "go on with the one in a file", files.load, "FILE", path=True),
    Order(_HELD, "copy", "put the last answer into the clipboard", turns.copy),
    Order(_HELD, "info", "model, context, memory, options that were changed", info.info),
    Order(_HELD, "help", "this list", _help),
    Order(_HELD, "exit", "leave (so does Ctrl-D); an open session is saved", _exit),
)  # fmt: skip
