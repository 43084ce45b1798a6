"""Tasks for tests: questions for nano, and a model that says what a script has."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_qwen35.evaluate.task import Asked, Item

OPTIONS = {"temp": 0.0, "max_tokens": 60}


class Sums:
    """Sums of two numbers. thinks: whether every other answer is with thinking, which takes longer."""

    name, version, published = "sums", "1", None

    def __init__(self, count: int = 12, thinks: bool = False, **options: Any):
        self.options, self._thinks = {**OPTIONS, **options}, thinks
        self._items = [Item(f"sum{i}", (10 + 7 * i, 60 - 3 * i)) for i in range(count)]

    def items(self) -> Sequence[Item]:
        return self._items

    def ask(self, item: Item) -> Asked:
        a, b = item.data
        return Asked(f"What is {a} + {b}?", {**self.options, "enable_thinking": self._thinks and a % 2 == 0})

    def expected(self, item: Item) -> str:
        return str(sum(item.data))

    def judge(self, item: Item, answer: str) -> float:
        return float(answer.strip() == str(sum(item.data)))


class Scripted(Sums):
    """Each question is answered by a text, whatever the model says. endless: the text again and again."""

    def __init__(self, tokens: Sequence[int], right: str, endless: bool = False, **options: Any):
        super().__init__(1, **options)
        self._tokens, self._right, self._endless = tokens, right, endless

    def ask(self, item: Item) -> Asked:
        return Asked("Which one?", {**self.options, "enable_thinking": True, "logits_processors": [self._force]})

    def _force(self, before: mx.array, logits: mx.array) -> mx.array:
        place = len(before) - self._start(before)
        token = self._tokens[place % len(self._tokens) if self._endless else min(place, len(self._tokens) - 1)]
        return mx.where(mx.arange(logits.shape[-1]) == token, 0.0, -mx.inf)[None]

    def _start(self, before: mx.array) -> int:
        self.first = getattr(self, "first", len(before))
        return self.first

    def expected(self, item: Item) -> str:
        return self._right

    def judge(self, item: Item, answer: str) -> float:
        return float(answer.strip() == self._right)


def by_key(lines: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {line["key"]: line for line in lines}
