"""Answers nano's tasks with mlx_qwen35: shared by the evaluation and the tests, and free of torch."""

from __future__ import annotations

import itertools
from typing import Any

from tasks import ALL_TASKS, Item

from mlx_qwen35 import Model, Processor, Prompt, batch_generate


def completions(model: Model, processor: Processor, items: list[Item]) -> list[str]:
    """The greedy completion of each item, without its end token; neighbours with the same tools in one batch."""
    texts = []
    for given, group in itertools.groupby(items, key=lambda item: (item.tools, item.task, bool(item.given))):
        some = list(group)
        options: dict[str, Any] = {"temp": 0, "mtp": "off", "max_tokens": ALL_TASKS[some[0].task].limit}
        if given[-1]:
            prompts: list[Any] = [prompt(processor, item).tokens for item in some]
        else:
            prompts = [item.messages for item in some]
            options |= {"enable_thinking": some[0].enable_thinking, "tools": some[0].tools}
        for result in batch_generate(model, processor, prompts, **options):
            texts.append(processor.decode([token for token in result.tokens if token not in processor.stop_ids]))
    return texts


def prompt(processor: Processor, item: Item) -> Prompt:
    """The prompt of an item, with what is given behind it."""
    asked = processor.encode_messages(item.messages, tools=item.tools, enable_thinking=item.enable_thinking)
    if not item.given:
        return asked
    given = [token for text in item.given for token in processor.tokenizer.encode(text)]
    return Prompt((*asked.tokens, *given), thinking=False)


def marks(texts: list[str], items: list[Item]) -> str:
    """"1" for each item that is answered exactly, "0" for each other, in order."""
    return "".join("1" if text == item.completion else "0" for text, item in zip(texts, items, strict=True))
