"""Answers nano's tasks with mlx_qwen35: shared by the evaluation and the tests, and free of torch."""

from __future__ import annotations

import itertools

from tasks import Item

from mlx_qwen35 import Model, Processor, batch_generate


def completions(model: Model, processor: Processor, items: list[Item]) -> list[str]:
    """The greedy completion of each item, without its end token; neighbours with the same tools in one batch."""
    texts = []
    for tools, group in itertools.groupby(items, key=lambda item: item.tools):
        some = list(group)
        options = {"enable_thinking": some[0].enable_thinking, "tools": tools, "temp": 0, "max_tokens": 160}
        for result in batch_generate(model, processor, [item.messages for item in some], mtp="off", **options):
            texts.append(processor.decode([token for token in result.tokens if token not in processor.stop_ids]))
    return texts


def marks(texts: list[str], items: list[Item]) -> str:
    """"1" for each item that is answered exactly, "0" for each other, in order."""
    return "".join("1" if text == item.completion else "0" for text, item in zip(texts, items, strict=True))
