"""A stream of OpenAI's chat completions, put together again. It asserts the rules that clients rely on."""

import json
from typing import Any

Json = dict[str, Any]


def events(text: str) -> list[Json]:
    """The objects of a stream. It ends with [DONE], and comments stand between them."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def folded(text: str) -> Json:
    """The answer that the chunks add up to, as it would come unstreamed."""
    chunks = events(text)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    choices: dict[int, list[Json]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            choices.setdefault(choice["index"], []).append(choice)
    whole = {"choices": [_choice(choices[index]) for index in sorted(choices)]}
    return whole | ({"usage": chunks[-1]["usage"]} if "usage" in chunks[-1] else {})


def _choice(parts: list[Json]) -> Json:
    first, *between, last = parts
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert last["delta"] == {} and last["finish_reason"] and last["logprobs"] is None
    assert not any(part["finish_reason"] for part in (first, *between))
    message: Json = {"role": "assistant", "content": ""}
    calls: list[Json] = []
    for delta in (part["delta"] for part in between):
        for name in ("content", "reasoning_content", "reasoning"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", []):
            _add(calls, dict(call))
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": calls}
    tokens = [token for part in between if part["logprobs"] for token in part["logprobs"]["content"]]
    logprobs = {"content": tokens, "refusal": None} if tokens else None
    return {"index": first["index"], "message": message, "logprobs": logprobs, "finish_reason": last["finish_reason"]}


def _add(calls: list[Json], part: Json) -> None:
    """A call begins with its id and name in one chunk; then come pieces of its arguments, before the next one."""
    index = part.pop("index")
    if index == len(calls):
        assert part["id"] and part["type"] == "function" and part["function"]["name"]
        calls.append(part | {"function": dict(part["function"])})
        return
    assert index == len(calls) - 1 and part.keys() == {"function"} and part["function"].keys() == {"arguments"}
    calls[index]["function"]["arguments"] += part["function"]["arguments"]
