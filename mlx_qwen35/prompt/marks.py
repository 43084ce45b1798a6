"""Where prompts part: the places of a prompt at which another one is likely to go on otherwise.

A chat template writes the next prompt anew: the reasoning of earlier turns goes, a tool's result comes behind the call.
What stays ends behind system and tools, before the first generation prompt of the last query, or before the newest.
Each such place stands before a control token that the template writes, so no text around it changes its tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from mlx_qwen35.errors import InputError
from mlx_qwen35.prompt.control import MARK
from mlx_qwen35.prompt.positions import Placeholder

SYSTEM, QUERY, TURN = "system", "query", "turn"
_USER = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})
_ANSWER = {"role": "assistant", "content": "a"}

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]  # (messages, whether with a generation prompt) -> text


class Mark(NamedTuple):
    """A place of a prompt: the tokens before it, and what ends there."""

    length: int
    kind: str


class Heads(NamedTuple):
    """How a template begins a user's message and an answer, from a control token on; "" where it has none there."""

    user: str
    answer: str

    @classmethod
    def of(cls, render: Render) -> "Heads":
        """render: a template, with the options of a prompt but its tools."""
        try:
            first, second = (render([message], False) for message in _USER)
            begun, answered = render(_USER[:1], True), render([_USER[0], _ANSWER], False)
        except InputError:  # the template refuses the samples
            return cls("", "")
        answer = _first_tag(_common(begun[len(first) :], answered[len(first) :]))
        return cls(_last_tag(_common(first, second)), answer)

    def places(self, text: str, answers: int) -> dict[int, str]:
        """Where a rendered text may be cut: characters before the place, and its kind.

        answers: how many the text has behind the last user's message, with the one that is to come.
        """
        found = {}
        if self.user and (start := text.find(self.user)) > 0:
            found[start] = SYSTEM
        if self.answer and answers:
            newest = query = text.rfind(self.answer)
            for _ in range(answers - 1):
                query = text.rfind(self.answer, 0, max(query, 0))
            found |= {newest: TURN, query: QUERY}
        return {place: kind for place, kind in found.items() if place > 0}


def _common(one: str, other: str) -> str:
    """What two texts begin with."""
    return one[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))]


def _last_tag(text: str) -> str:
    """A text from its last control token on."""
    return text[max(0, text.rfind(MARK) - 1) :] if MARK in text else ""


def _first_tag(text: str) -> str:
    """A text that begins with a control token, up to the next one; "" for another text."""
    first, second = text.find(MARK), text.find(MARK, 2)
    return text[: second - 1 if second > 0 else None] if first == 1 else ""


def answers_behind_query(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many answers stand behind the last user's message."""
    roles = [message["role"] for message in messages]
    last = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    return roles[last + 1 :].count("assistant")


def marks_at(
    places: Mapping[int, str], text: str, control: Sequence[int], placeholders: Sequence[Placeholder]
) -> tuple[Mark, ...]:
    """Places of a text -> marks in its tokens.

    control: where the control tokens are, each placeholder counted as one token. placeholders: of the whole prompt.
    """
    marks = []
    for place, kind in sorted(places.items()):
        length = control[text.count(MARK, 0, place)]
        for placeholder in placeholders:
            if placeholder.start < length:
                length += placeholder.height * placeholder.width - 1
        marks.append(Mark(length, kind))
    return tuple(marks)
