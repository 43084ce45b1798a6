"""What transformers makes of 20 conversations: the loss and the number of targets of each, on a random checkpoint.

    python tests/train_rows.py

writes train_rows.json; it needs torch and transformers 5.23. Prompts and answers are rendered by transformers'
tokenizer, answer by answer, with nano's vocabulary and template.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from parity import cases
from talks import answer, drawn, user

CASE = cases.Case("rows", 19, {"vocab_size": 1024})
GOLDEN = Path(__file__).with_suffix(".json")
TALKS = [
    {"messages": [user("Hi"), answer("Hello")]},
    {"messages": [user("a b"), answer("c d", "because"), user("e"), answer("f")]},
    *map(drawn, range(1000, 1018)),
]
CUT = {2: 100, 5: 100, 8: 700, 11: 850, 14: 300, 18: 850}  # conversations that are too long, and the most tokens
LIMITS = [CUT.get(number, 4000) for number in range(len(TALKS))]


def losses(folder: Path) -> list[list[float]]:
    """[sum of -log p, targets] of each conversation. folder: the checkpoint of CASE."""
    import torch
    from parity.reference import load_text_model
    from transformers import AutoTokenizer

    from mlx_qwen35.checkpoint.hub import resolve

    tokenizer, model = AutoTokenizer.from_pretrained(resolve("nano")), load_text_model(CASE, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return [_of_talk(model, tokenizer, talk, limit) for talk, limit in zip(TALKS, LIMITS, strict=True)]
    finally:
        torch.set_num_threads(threads)


def _of_talk(model: Any, tokenizer: Any, talk: dict[str, Any], limit: int) -> list[float]:
    import torch

    messages, total, count = _usual(talk["messages"]), 0.0, 0
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        thinking = "reasoning_content" in message or "</think>" in message["content"]
        given = {"tools": talk.get("tools"), "enable_thinking": thinking, "return_dict": False}
        asked = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, **given)
        whole = tokenizer.apply_chat_template(messages[: i + 1], **given)
        assert whole[: len(asked)] == asked
        stop = min(whole.index(end, len(asked)) + 1, limit)
        if stop > len(asked):
            ids = torch.tensor([whole[:stop]])
            labels = ids.clone()
            labels[:, : len(asked)] = -100
            total += model(ids, labels=labels, use_cache=False).loss.item() * (stop - len(asked))
            count += stop - len(asked)
    return [total, count]


def _usual(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the template takes them: arguments as mappings, results in the order of their calls."""
    out: list[dict[str, Any]] = []
    for message in messages:
        own = {**message, "content": message["content"] or ""}
        calls = [one["function"] for one in own.get("tool_calls", [])]
        if calls:
            own["tool_calls"] = [{"function": {**one, "arguments": _object(one["arguments"])}} for one in calls]
        out.append(own)
    start = 0
    for i, message in enumerate([*out, {"role": "none"}]):
        if message["role"] != "tool":
            out[start:i] = sorted(out[start:i], key=lambda one: one["tool_call_id"])
            start = i + 1
    return out


def _object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = losses(cases.write(CASE, Path(scratch) / "model"))
    GOLDEN.write_text(json.dumps(found) + "\n")
    print(f"{len(found)} conversations, {sum(count for _, count in found)} targets")
