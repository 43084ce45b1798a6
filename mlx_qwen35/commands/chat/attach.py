"""Commands that add images, videos and documents to the next message; files that are dropped on the terminal."""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_qwen35.commands.chat.talk import Part, Talk, media_of
from mlx_qwen35.commands.output import media_lines
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.signatures import HEAD, IMAGES, identify

_LONGEST = 1 << 15  # characters of a line of dropped files
_PAGES = re.compile(r"\d[\d,-]*")


def names(text: str) -> list[str]:
    """The files that a text names: as typed, quoted, or dropped from the Finder, which escapes blanks."""
    if os.path.exists(os.path.expanduser(text)):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quotation mark that is left open
        return [text]


def one_name(text: str) -> str:
    """The same where it must be one: blanks that are neither quoted nor escaped belong to the name."""
    found = names(text)
    return found[0] if len(found) == 1 else text


def _is_file(name: str) -> bool:
    return os.path.isfile(os.path.expanduser(name))


def attach(talk: Talk, parts: Sequence[Part], what: str) -> None:
    """Add parts to the next message: all of them, or none where one cannot be read."""
    conversation = talk.conversation
    with talk.screen.step(f"reading {what}", "images") as step:
        found = conversation.processor.read_parts(parts, conversation.vision, step)
    for line in media_lines(media_of(found), media_of(talk.media)):
        talk.screen.say(line)
    talk.media += found


def add(kind: str) -> Callable[[Talk, str], None]:
    """The command that adds images, or videos."""

    def added(talk: Talk, argument: str) -> None:
        attach(talk, [{"type": kind, kind: name} for name in _required(kind, names(argument))], argument)

    return added


def add_document(talk: Talk, argument: str) -> None:
    *files, last = _required("pdf", names(argument))
    pages = {"pages": last} if files and _PAGES.fullmatch(last) and not _is_file(last) else {}
    attach(talk, [{"type": "pdf", "pdf": name, **pages} for name in (files if pages else [*files, last])], argument)


def _required(kind: str, found: list[str]) -> list[str]:
    if not found:
        raise InputError("option_missing", f"/{kind} must name a file or URL")
    return found


def paste(talk: Talk, _: str) -> None:
    found = talk.clipboard.image()
    if isinstance(found, list):  # files that were copied
        parts = dropped(shlex.join(found)) or [{"type": "image", "image": name} for name in found]
    else:
        parts = [{"type": "image", "image": found}]
    attach(talk, parts, "the clipboard")


def drop(talk: Talk, _: str) -> None:
    told, talk.media = talk.attached, []
    talk.screen.say(f"dropped {told}" if told else "there was nothing to drop")


def dropped(line: str) -> list[Part]:
    """The parts that a line stands for if it names images, videos and documents that are there and nothing else; else
    none, and it is a message.
    """
    if len(line) > _LONGEST:
        return []
    parts = [_part(name) for name in names(line)]
    return [part for part in parts if part] if all(parts) else []


def _part(name: str) -> Part | None:
    """The part that a file is, by its first bytes."""
    path = Path(os.path.expanduser(name))
    try:
        if not os.path.isfile(path):
            return None
        with path.open("rb") as file:
            found = identify(file.read(HEAD))
    except OSError:
        return None
    kinds = {"image": found in IMAGES, "video": found.startswith("a video"), "pdf": found == "a PDF document"}
    return next(({"type": kind, kind: name} for kind, holds in kinds.items() if holds), None)
