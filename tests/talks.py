"""Conversations as people train on them: several turns, reasoning, tools, blanks, other scripts."""

import json
import random
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
_TYPES = {"city": "string", "days": "integer", "exact": "boolean", "names": "array", "place": "object"}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {key: {"type": kind} for key, kind in _TYPES.items()}}}}
    for name in ("weather", "search")
]  # fmt: skip
_WORDS = (
    "Hi", "the sum is 12", "Köln", "日本語のテキスト", "e\u0301 and é", "👩‍🚀", "line\n\nline", "  two  blanks ",
    "a\tb", "`print(1)`", "x = 3;", "1,234.5 %", "\u00a0", "—", "don't", "{}", "", "ﬁ", "नमस्ते", "\r\n",
    "<b>bold</b>", "\u200b",
)  # fmt: skip


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def answer(content: Any, reasoning: str | None = None, **fields: Any) -> Row:
    thought = {"reasoning_content": reasoning} if reasoning else {}
    return {"role": "assistant", "content": content, **thought, **fields}


def call(name: str, arguments: Any, number: int = 0) -> Row:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: Any, number: int = 0) -> Row:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": content}


class Draw:
    """Random choices. Of Python's generator only random() is promised to be the same in every version."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def whole(self, least: int, most: int) -> int:
        return least + int(self.random() * (most - least + 1))

    def choice(self, of: Sequence[Any]) -> Any:
        return of[self.whole(0, len(of) - 1)]

    def sample(self, of: Sequence[Any], count: int) -> list[Any]:
        """So many of them in another order."""
        rest = list(of)
        return [rest.pop(self.whole(0, len(rest) - 1)) for _ in range(count)]


def _text(draw: Draw) -> str:
    words = " ".join(draw.choice(_WORDS) for _ in range(draw.whole(1, 5)))
    return draw.choice(["", " ", "\n"]) + words + draw.choice(["", "\n"])


def _said(draw: Draw) -> str:
    """A text that is not blank."""
    return f"{_text(draw)} {draw.choice('abc')}{_text(draw)}"


def _arguments(draw: Draw) -> Any:
    values = {"city": _said(draw), "days": draw.whole(-5, 10**9), "exact": draw.random() < 0.5,
              "names": [_text(draw), 1], "place": {"a": None, "b": _text(draw)}}  # fmt: skip
    chosen = {key: values[key] for key in draw.sample(sorted(values), draw.whole(0, 3))}
    return json.dumps(chosen) if draw.random() < 0.3 else chosen


def drawn(seed: int) -> Row:
    """A random row with `messages`, and with `tools` where it calls any."""
    draw = Draw(seed)
    messages: list[Row] = []
    if draw.random() < 0.5:
        messages.append({"role": "system", "content": draw.choice(["", _said(draw)])})
    tools = draw.random() < 0.5
    for _ in range(draw.whole(1, 3)):
        content: Any = _said(draw)
        if draw.random() < 0.2:
            content = [{"type": "text", "text": content}, {"type": "text", "text": _text(draw)}]
        messages.append(user(content))
        for _ in range(draw.whole(0, 2) if tools else 0):
            calls = [call(draw.choice(["weather", "search"]), _arguments(draw), n) for n in range(draw.whole(1, 2))]
            reasoning = _said(draw) if draw.random() < 0.5 else None
            messages.append(answer(draw.choice(["", None, _said(draw)]), reasoning, tool_calls=calls))
            results = [result(_text(draw), n) for n in range(len(calls))]
            messages += draw.sample(results, len(results))
        reasoning, content = (_said(draw) if draw.random() < 0.5 else None), _said(draw)
        if reasoning and draw.random() < 0.3:
            messages.append(answer(f"<think>\n{reasoning}\n</think>\n\n{content}"))
        else:
            messages.append(answer(content, reasoning))
    return {"messages": messages} | ({"tools": TOOLS} if tools else {})
