"""Streams of Anthropic's messages and OpenAI's responses, put together again. The rules of clients are asserted."""

import json
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
_TEXTS = {"thinking_delta": "thinking", "text_delta": "text", "signature_delta": "signature"}


def events(text: str) -> Iterator[Json]:
    """The objects of a stream. Each event is named as its object's type."""
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found = json.loads(data.removeprefix("data: "))
        assert name == f"event: {found['type']}"
        yield found


def message(text: str) -> Json:
    """The message that the events of a stream add up to, as it would come unstreamed."""
    first, *rest = events(text)
    assert first["type"] == "message_start" and rest[0] == {"type": "ping"}
    *rest, delta, last = [event for event in rest if event["type"] != "ping"]
    assert (delta["type"], last) == ("message_delta", {"type": "message_stop"})
    made: Json = first["message"]
    assert made["content"] == [] and made["stop_reason"] is None and made["usage"]["output_tokens"] == 0
    for event in rest:
        _add(made["content"], event)
    assert not any("open" in block for block in made["content"])
    for block in made["content"]:
        if block["type"] == "tool_use":
            block["input"] = _object(block.pop("json"))
    counted = made["usage"]["input_tokens"]
    made |= delta["delta"] | {"usage": delta["usage"]}
    assert counted == made["usage"]["input_tokens"] + made["usage"]["cache_read_input_tokens"]
    return made


def _add(content: list[Json], event: Json) -> None:
    """One block is open at a time: the last."""
    if event["type"] == "content_block_start":
        assert event["index"] == len(content) and not (content and "open" in content[-1])
        content.append({**event["content_block"], "open": True})
        if content[-1]["type"] == "tool_use":
            content[-1]["json"] = ""
        return
    assert event["index"] == len(content) - 1 and content[-1]["open"]
    if event["type"] == "content_block_stop":
        del content[-1]["open"]
        return
    delta = event["delta"]
    name = _TEXTS.get(delta["type"], "json")
    content[-1][name] += delta.get(name, delta.get("partial_json"))


def _object(text: str) -> Json:
    """JSON, of a text that is cut the whole members, as Anthropic's SDK reads it."""
    for ending in ("", "}"):
        for end in range(len(text), -1, -1):
            try:
                return json.loads(text[:end] + ending)
            except ValueError:
                if not ending:
                    break
    return {}


def response(text: str) -> Json:
    """The response that the events of a stream add up to. Its last event has to say the same."""
    found = list(events(text))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    last = found[-1]["response"]
    assert found[-1]["type"] == f"response.{last['status']}"
    output: list[Json] = []
    for event in found[2:-1]:
        if event["type"] != "response.in_progress":
            _grow(output, event)
    assert [item.pop("done") for item in output] == [True] * len(output)
    assert output == last["output"]
    return last


def _grow(output: list[Json], event: Json) -> None:
    """One item is under way at a time: the last."""
    kind = event["type"].removeprefix("response.")
    if kind == "output_item.added":
        assert event["output_index"] == len(output) and event["item"]["status"] == "in_progress"
        output.append(event["item"] | {"done": False})
        return
    assert event["output_index"] == len(output) - 1
    item = output[-1]
    assert not item["done"] and event.get("item_id", item["id"]) == item["id"]
    if kind == "output_item.done":
        output[-1] = event["item"] | {"done": True}
        late = ("done", "status", "encrypted_content")  # what the end tells first
        assert all(output[-1][name] == value for name, value in item.items() if name not in late)
    elif kind.startswith("function_call_arguments"):
        _say(item, "arguments", kind, event.get("delta", event.get("arguments")))
    else:
        parts = item["summary" if "summary" in kind else "content"]
        if kind.endswith("part.added"):
            parts.append(event["part"])
        elif kind.endswith("part.done"):
            assert parts[-1] == event["part"]
        else:
            _say(parts[-1], "text", kind, event.get("delta", event.get("text")))


def _say(where: Json, name: str, kind: str, text: str) -> None:
    """A delta adds; what is done has been told before."""
    if kind.endswith(".delta"):
        where[name] += text
    else:
        assert kind.endswith(".done") and where[name] == text
