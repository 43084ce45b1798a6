"""What a model is asked in an evaluation, and how its answers are judged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Prompt = str | Sequence[Mapping[str, Any]]
TOO_LONG = "too_long"  # the finish reason of a question that the context has no room for


@dataclass(frozen=True)
class Item:
    """One question of a task. key: names it for good, unique in its task. data: what the task knows of it."""

    key: str
    data: Any


@dataclass(frozen=True)
class Asked:
    """What a model is asked.

    prompt: messages; or text, which becomes one user message, or is raw text by the option ignore_chat_template.
    options: of `generate`, as the task needs them. What the user of the command gives wins.
    choices: none: the model writes an answer. Otherwise the answer is the choice that is the most probable one behind
    the prompt, as text without reasoning; options other than those of the prompt have no effect then.
    """

    prompt: Prompt
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: Sequence[str] = ()


@dataclass(frozen=True)
class Published:
    """A figure that was published of the model. score: 0 to 1. source: who says so, and where. note: what differs."""

    score: float
    source: str
    note: str = ""


class Task(Protocol):
    """Questions whose answers are judged. A score is the mean of all judgements.

    name: of its files and of its entry in summary.json: letters, digits, "_", "-" and ".". version: a text that
    changes with questions, prompts or judgement; a run goes on with its own version alone.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def published(self) -> Published | None: ...

    def items(self) -> Sequence[Item]:
        """All questions, always in the same order."""
        ...

    def ask(self, item: Item) -> Asked:
        """What the model is asked. InputError for a question that cannot be, as one whose picture is missing."""
        ...

    def expected(self, item: Item) -> str | Sequence[str]:
        """What is right, for people to read; of several texts each is."""
        ...

    def judge(self, item: Item, answer: str) -> float:
        """0 (wrong) to 1 (right). answer: the text behind the reasoning; one that was cut may be empty."""
        ...
