"""What an item is, how a question is typed, and which items are held out of the training."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from PIL import Image

Call = tuple[str, Mapping[str, Any]]  # the name of a function and its arguments


@dataclass(frozen=True)
class Turn:
    """One question about a context: the user's words, the visible thought, the answer and the key of the split."""

    question: str | None  # None: the context already ends where the assistant speaks
    thought: str
    answer: str
    key: str  # "" belongs to the training and to the held-out items alike
    calls: tuple[Call, ...] = ()  # what the answer calls
    given: tuple[str, ...] = ()  # what the model has said before the answer, see Item


@dataclass(frozen=True)
class Context:
    """What one or several questions are about."""

    data: Any = None
    intro: tuple[Any, ...] = ()  # strings, pictures and clips that open the first user message
    history: tuple[dict[str, Any], ...] = ()  # messages before the first user message
    tools: tuple[dict[str, Any], ...] = ()
    schema: Mapping[str, Any] | None = None  # of an answer in JSON


@dataclass(frozen=True)
class Clip:
    """A short film: `frames` are 64 x 64 pictures shown at `fps` pictures a second."""

    frames: list[Image.Image]
    fps: float


@dataclass(frozen=True)
class Item:
    """One question with its exact answer.

    `completion` is the text after the generation prompt without the closing `<|im_end|>`: with `enable_thinking` it
    starts inside the think block. `answer` is what follows the think block. `given` stands between generation prompt
    and completion: a thought that was cut, and the words that closed it, each a text that was tokenized on its own.
    """

    task: str
    messages: list[dict[str, Any]]
    completion: str
    answer: str
    enable_thinking: bool
    tools: list[dict[str, Any]] | None = None
    given: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    schema: Mapping[str, Any] | None = None
    key: str = field(default="", compare=False)


@dataclass(frozen=True)
class Task:
    """A named kind of question: `context` makes what is asked about, `ask` asks about it."""

    name: str
    context: Callable[[Random, bool], Context]
    ask: Callable[[Random, Context], Turn]
    again: Callable[[Random, Context, Turn], Turn | None] | None = None  # a further question on the same context
    modes: tuple[bool, ...] = (False, True)  # thinking
    limit: int = 160  # tokens of an answer


def is_held_out(key: str) -> bool:
    """True for the tenth of all keys that training never sees; the empty key is in both parts."""
    return key != "" and zlib.crc32(key.encode()) % 10 == 0


def vary(rng: Random, text: str) -> str:
    """Types `text` the way people do: now and then without a capital, without the mark at the end, or shouting it."""
    roll = rng.random()
    if roll < 0.15:
        return text[0].lower() + text[1:]
    if roll < 0.25:
        return text.rstrip("?.!")
    if roll < 0.33:
        return text[0].lower() + text[1:].rstrip("?.!")
    if roll < 0.36:
        return text + ("?" if text.endswith("?") else "!")
    return text


def join(parts: list[str]) -> str:
    """`["a", "b", "c"]` -> `"a, b and c"`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def empty(rng: Random, easy: bool) -> Context:
    return Context()


def _part(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if isinstance(value, Clip):
        return {"type": "video", "video": value.frames, "source_fps": value.fps}
    return {"type": "image", "image": value}


def user_message(parts: list[Any]) -> dict[str, Any]:
    """A user message: plain text where there is nothing else, a list of parts where there is."""
    if all(isinstance(part, str) for part in parts):
        return {"role": "user", "content": "".join(parts)}
    return {"role": "user", "content": [_part(part) for part in parts]}


def completion(turn: Turn, thinking: bool) -> str:
    """The text that follows the generation prompt and what is given."""
    return f"{turn.thought}\n</think>\n\n{turn.answer}" if thinking and not turn.given else turn.answer


def again(ask: Callable[[Random, Context], Turn]) -> Callable[[Random, Context, Turn], Turn]:
    """A further question of the same kind."""
    return lambda rng, context, turn: ask(rng, context)
