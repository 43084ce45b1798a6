"""Writes the questions that come with nano, for mlx_qwen35.eval: python examples/nano/questions.py

The first held-out items of each text task and mode, as variants.py compares recipes on and evaluation.json scores.
"""

from __future__ import annotations

import json
from pathlib import Path

from tasks import items_of
from variants import LESSONS, MODES, SEED

ITEMS = 10
FILE = Path(__file__).resolve().parents[2] / "mlx_qwen35" / "nano" / "questions.jsonl"


def lines() -> list[str]:
    """A JSON object for each item; where calls are the answer it has none."""
    found = []
    for task in LESSONS:
        for thinking in MODES:
            for number, item in enumerate(items_of(task, thinking, ITEMS, SEED)):
                options = {"enable_thinking": thinking} | ({"tools": item.tools} if item.tools else {})
                line = {
                    "key": f"{task}.{'thinking' if thinking else 'direct'}.{number}", "messages": item.messages,
                    **({} if item.calls else {"answer": item.answer}), "options": options,
                    "completion": item.completion,
                }  # fmt: skip
                found.append(json.dumps(line, ensure_ascii=False))
    return found


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
