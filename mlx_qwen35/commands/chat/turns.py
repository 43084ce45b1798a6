"""Commands that go back: another answer, a message taken back or edited, everything forgotten; and the last answer
copied.
"""

import secrets
from collections.abc import Mapping
from typing import Any

from mlx_qwen35.commands.chat.settings import number
from mlx_qwen35.commands.chat.talk import Part, Talk
from mlx_qwen35.engine.presets import MOST_SEED, check_seed
from mlx_qwen35.errors import InputError

_SHORT = 40  # characters of a message in a confirmation


def text_and_media(message: Mapping[str, Any]) -> tuple[str, list[Part]]:
    """The text of a message that the user typed, which is its last, and the parts that were added to it."""
    content = message["content"]
    if isinstance(content, str):
        return content, []
    texts = [i for i, part in enumerate(content) if part["type"] == "text"]
    if not texts:
        return "", list(content)
    return content[texts[-1]]["text"], [*content[: texts[-1]], *content[texts[-1] + 1 :]]


def shortened(text: str) -> str:
    """A text on one line, in quotation marks."""
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= _SHORT else f'"{line[:_SHORT].rstrip()}..."'


def retry(talk: Talk, argument: str) -> None:
    """Another seed than the last one, unless one is named, since the same would give the same text."""
    talk.abandon()
    seed = check_seed(number(argument)) if argument else _next_seed(talk)
    turn = talk.conversation.regenerate(seed)
    talk.screen.say(f"another answer, seed {seed}")
    if talk.conversation.sampling.temp == 0:
        talk.screen.say("at temperature 0 every seed gives the same; /set temp 0.7 changes that")
    talk.show(turn)


def _next_seed(talk: Talk) -> int:
    return (talk.last.seed + 1) % (MOST_SEED + 1) if talk.last else secrets.randbelow(MOST_SEED + 1)


def undo(talk: Talk, _: str) -> None:
    talk.abandon()
    text, _media = text_and_media(talk.conversation.undo()[0])
    left = sum(message["role"] == "user" for message in talk.conversation.messages)
    talk.screen.say(f"took back {shortened(text)} and its answer; {left or 'no'} question{'s' * (left != 1)} left")


def edit(talk: Talk, _: str) -> None:
    talk.abandon()
    asked = [message for message in talk.conversation.messages if message["role"] == "user"]
    if not asked:
        raise InputError("messages_invalid", "/edit needs a message that was sent; there is none")
    text, media = text_and_media(asked[-1])
    talk.edit(text, media)
    talk.screen.say(f"editing {shortened(text)}; an empty line leaves it")


def copy(talk: Talk, _: str) -> None:
    answers = [message["content"] for message in talk.conversation.messages if message["role"] == "assistant"]
    if not answers:
        raise InputError("messages_invalid", "/copy needs an answer; there is none")
    way = talk.clipboard.copy(answers[-1])
    talk.screen.say(f"copied {len(answers[-1]):,} characters with {way}")


def reset(talk: Talk, _: str) -> None:
    """A session keeps what it holds: it is saved and let go of."""
    talk.abandon()
    told = ["forgotten"]
    if talk.session and any(message["role"] != "system" for message in talk.conversation.messages):
        told.append(f"{talk.session.path} keeps the old conversation, /save FILE begins a file for the next")
        talk.release()
    talk.conversation.reset()
    talk.media, talk.last, talk.figures = [], None, ""
    if talk.conversation.system:
        told.append("the system prompt stays")
    talk.screen.say("; ".join(told))
