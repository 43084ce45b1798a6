"""Messages of a conversation whose answers call tools: an answer with its calls, and the results of these."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

Results = Mapping[str, str | Sequence[Any]] | Sequence[Mapping[str, Any]]
Message = dict[str, Any]


def result_messages(messages: Sequence[Message], results: Results) -> list[Message]:
    """The results of the calls in the last message, as messages in the order of the calls.

    results: call id -> content, or messages of the role "tool" with tool_call_id and content. Raises InputError
    (messages_invalid) unless they are one for each call.
    """
    last: Message = messages[-1] if messages else {}
    calls = [call["id"] for call in last.get("tool_calls", [])]
    if not calls:
        raise _refused("results must come behind an answer with calls; the last message has none")
    given = _pairs(results)
    found = dict(given)
    known = f"the last answer has {', '.join(map(shown, calls))}"
    if unknown := [name for name, _ in given if name not in calls]:
        raise _refused(f"a result must name a call of the last answer by its id; {known}, got {shown(unknown[0])}")
    if len(found) < len(given):
        raise _refused(f"a call must have one result; {known}, and there are {len(given)} results")
    if missing := [call for call in calls if call not in found]:
        raise _refused(f"each call must have a result, be it that it failed; {shown(missing[0])} has none")
    return [{"role": "tool", "tool_call_id": call, "content": found[call]} for call in calls]


def _pairs(results: Results) -> list[tuple[Any, Any]]:
    """(call id, content) of each result."""
    if isinstance(results, Mapping):
        return list(results.items())
    if not isinstance(results, list | tuple) or not all(isinstance(message, Mapping) for message in results):
        raise _refused(f"results must be a mapping of call ids to contents or a list of messages, got {shown(results)}")
    for message in results:
        if message.get("role") != "tool" or set(message) - {"role", "tool_call_id", "content", "name"}:
            form = '{"role": "tool", "tool_call_id": ..., "content": ...}'
            raise _refused(f"a result must be like {form}, got {shown(message)}")
    return [(message.get("tool_call_id"), message.get("content")) for message in results]


def _refused(message: str) -> InputError:
    return InputError("messages_invalid", message)
