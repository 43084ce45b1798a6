"""An agent's session: 3 queries of 8 tool steps each with 14 tools, as the 27 prompts that its client sends.

    python tests/engine/agent_session.py FOLDER

counts the tokens that a library of prefixes leaves to read, with the tokenizer and the chat template of FOLDER. nano
reads them, each token taken for one of its own: what is compared and counted stays the same.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

Messages = list[dict[str, Any]]
QUERIES, STEPS, TOOLS = 3, 8, 14
WORDS = ("file", "line", "test", "value", "error", "path", "name", "list", "change", "module", "call", "result")


def text(rng: np.random.Generator, words: int) -> str:
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=words))


def tools(size: int) -> list[dict[str, Any]]:
    """TOOLS functions with descriptions of so many words in all."""
    rng, each = np.random.default_rng(0), size // (2 * TOOLS)
    parameter = {"type": "string", "description": text(rng, each)}
    return [
        {
            "type": "function",
            "function": {
                "name": f"tool_{i}", "description": text(rng, each),
                "parameters": {"type": "object", "properties": {"path": parameter}, "required": ["path"]},
            },
        }
        for i in range(TOOLS)
    ]  # fmt: skip


def requests(size: int, reasoning: bool = True) -> Iterator[Messages]:
    """The messages of each request. size: words of a tool's result. reasoning: whether the client sends it back."""
    rng = np.random.default_rng(1)
    messages: Messages = [{"role": "system", "content": text(rng, 2 * size)}]
    for _ in range(QUERIES):
        messages.append({"role": "user", "content": text(rng, size // 4)})
        for step in range(STEPS + 1):
            yield list(messages)
            answer: dict[str, Any] = {"role": "assistant", "content": text(rng, size // 8)}
            if reasoning:
                answer["reasoning_content"] = text(rng, size // 4)
            if step < STEPS:
                call = {"name": f"tool_{rng.integers(TOOLS)}", "arguments": {"path": text(rng, 2)}}
                answer["tool_calls"] = [{"id": f"{len(messages)}", "type": "function", "function": call}]
            messages.append(answer)
            if step < STEPS:
                messages.append({"role": "tool", "content": text(rng, size), "tool_call_id": f"{len(messages) - 1}"})


def count(folder: Path, size: int, reasoning: bool) -> tuple[int, int]:
    """Tokens of all prompts, and those of them that are read."""
    from mlx_qwen35 import Processor, load
    from mlx_qwen35.engine.engine import Engine
    from mlx_qwen35.engine.presets import Sampling
    from mlx_qwen35.engine.sampling import Sampler
    from mlx_qwen35.engine.sequence import Sequence
    from mlx_qwen35.prompt.tokenizer import load_tokenizer

    model, own = load("nano")
    config = replace(own.config, text=replace(own.config.text, vocab_size=1 << 20), eos_token_ids=(), token_ids={})
    processor, rows = Processor(load_tokenizer(folder), config), model.config.vocab_size
    engine, library, total = Engine(model), model.make_library(1), 0
    for messages in requests(size, reasoning):
        prompt = processor.encode_messages(messages, tools=tools(12 * size))
        prompt = replace(prompt, tokens=tuple(token % rows for token in prompt.tokens))
        sampler = Sampler(Sampling(temp=0), 0, len(prompt.tokens), rows)
        engine.add(Sequence(prompt, sampler, 1, prefill_step_size=512, library=library))
        while not engine.idle:
            engine.step()
        total += len(prompt.tokens)
    assert total == library.counts.read + library.counts.reused
    return total, library.counts.read


if __name__ == "__main__":
    for reasoning, client in ((True, "sends the reasoning back"), (False, "drops it")):
        total, read = count(Path(sys.argv[1]), 270, reasoning)
        print(f"a client that {client}: {read:,} of {total:,} prompt tokens read, {100 * read / total:.1f} %")
        assert read <= 0.09 * total
