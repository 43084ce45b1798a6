"""Where a prompt parts from one that was read before, and what of it is likely to have changed.

An editor that writes the time into its system prompt has every turn read anew. The server tells the place, so that this
can be mended.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_qwen35.cache.prefix import SYSTEM, PrefixLibrary
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.engine.encode import prefix_of
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt

MUCH = 256  # tokens that must be read again, for a report to be worth a line
RUN = 8  # tokens in a row that make a text the same
_FACTOR = np.array([0x9E3779B97F4A7C15], np.uint64)  # an array's product wraps around
SHOWN, BEFORE = 40, 12  # characters of a text that is shown, and those of them before the place


@dataclass(frozen=True)
class Parted:
    """A prompt that must be read again though much of it was read before.

    token: how many tokens it shares with the nearest prompt. again: about how many are read once more. guess: what has
    changed: "system", "tools", "reasoning", "image", "message 3" (counted from 0) or "text". texts: the prompt's own
    around the place, and the other's. They are for an operator alone, since the other may be of another client.
    """

    token: int
    again: int
    guess: str
    texts: tuple[str, str]

    def __str__(self) -> str:
        return (
            f"about {self.again} tokens of a prompt are read again: it parts at token {self.token} from one that was "
            f"read before; likely cause: {self.guess}"
        )


def parted(
    library: PrefixLibrary,
    processor: Processor,
    prompt: Prompt,
    given: Any = None,
    tools: Any = None,
    adapter: str = "",
) -> Parted | None:
    """Where a prompt parts from the nearest in a library; None where little is read again.

    given: the messages that it was made of, if it was made of messages. tools: those of the request. adapter: the name
    of the one that reads it.
    """
    prefix = prefix_of(prompt, adapter)
    near, place, reused = _nearest(library, prefix)
    if near is None or min(len(near), len(prefix)) - reused < MUCH:
        return None
    again = place - reused + _again(near.tokens[place:], prefix.tokens[place:])
    if again < MUCH:
        return None
    guess = _guess(processor, prompt, prefix, near, place, given, tools)
    return Parted(place, again, guess, (_around(processor, prefix, place), _around(processor, near, place)))


def _nearest(library: PrefixLibrary, prefix: Prefix) -> tuple[Prefix | None, int, int]:
    """The prompt that shares most with this one and goes on otherwise; where that is; the tokens that are reused."""
    near, place, reused = None, 0, 0
    for entry in library.entries():  # the shortest first
        shared = prefix.shared(entry.prefix)
        if shared == len(entry.prefix):
            reused = max(reused, shared if shared < len(prefix) else 0)
        elif shared < len(prefix) and shared >= max(place, 1):
            near, place = entry.prefix, shared
    return near, place, reused


def _again(old: np.ndarray, new: np.ndarray) -> int:
    """About how many tokens of one text stand in another, in runs of RUN."""
    if min(len(old), len(new)) < RUN:
        return 0
    return int(np.isin(_runs(old), _runs(new)).mean() * len(old))


def _runs(tokens: np.ndarray) -> np.ndarray:
    """A number for each RUN tokens in a row."""
    count = len(tokens) - RUN + 1
    numbers = np.zeros(count, np.uint64)
    for i in range(RUN):
        numbers = numbers * _FACTOR + tokens[i : i + count].astype(np.uint64)
    return numbers


# --- what has changed ---


def _guess(
    processor: Processor, prompt: Prompt, prefix: Prefix, near: Prefix, place: int, given: Any, tools: Any
) -> str:
    if any(shown.start == place for own in (prefix, near) for shown in own.media):
        return "image"
    messages = given if isinstance(given, Sequence) and given and isinstance(given[0], Mapping) else ()
    system = next((mark.length for mark in prompt.marks if mark.kind == SYSTEM), 0)
    if place < system:
        whole = processor.decode(prompt.tokens[:system])
        return "tools" if tools and not _inside_system(processor, prompt, place, whole, messages) else "system"
    if any(processor.opens_thinking(own.tokens[: place + 1].tolist()) for own in (prefix, near)):
        return "reasoning"
    return f"message {_message(processor, prompt, place, messages)}" if messages else "text"


def _inside_system(processor: Processor, prompt: Prompt, place: int, whole: str, messages: Sequence[Any]) -> bool:
    """Whether a place is in the text of a system message. whole: the prompt's text up to the first question."""
    at = len(processor.decode(prompt.tokens[:place]))
    texts = (text for message in messages if message.get("role") in ("system", "developer") for text in _texts(message))
    return any(0 <= (start := whole.find(text)) <= at <= start + len(text) for text in texts)


def _message(processor: Processor, prompt: Prompt, place: int, messages: Sequence[Any]) -> int:
    """The number of the message that has a place, or that begins behind it."""
    whole, at, end = processor.decode(prompt.tokens), len(processor.decode(prompt.tokens[:place])), 0
    for number, message in enumerate(messages):
        for text in _texts(message):
            if (start := whole.find(text, end)) >= 0:
                end = start + len(text)
        if end >= at:
            return number
    return len(messages) - 1


def _texts(message: Mapping[str, Any]) -> Iterable[str]:
    """What a message says, as a template writes it: without blanks around it."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part.get("text") for part in content]
    return (part.strip() for part in parts if isinstance(part, str) and part.strip())


def _around(processor: Processor, prefix: Prefix, place: int) -> str:
    """The text around a place, on one line."""
    before = processor.decode(prefix.tokens[max(0, place - BEFORE) : place].tolist())[-BEFORE:]
    return repr((before + processor.decode(prefix.tokens[place : place + SHOWN].tolist()))[:SHOWN])
