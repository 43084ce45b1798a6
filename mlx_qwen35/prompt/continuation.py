"""A prompt that ends inside its last message, an assistant's, so that the answer goes on with it.

The place is marked in the message before the template is rendered, and the prompt is cut there, as transformers does.
"""

from collections.abc import Sequence
from typing import Any

from mlx_qwen35.errors import InputError

# A lone surrogate, as the marks of control.py. The blank behind it tells whether the template trims the message.
_PLACE, _BLANK = "\ud802", " "


def opened(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages with a mark at the end of the last one's content, or of its reasoning where it has no content.

    Raises InputError (messages_invalid) unless that is an assistant's text without tool calls.
    """
    last = messages[-1] if messages else {"role": "none"}
    if last["role"] != "assistant":
        raise _refused(f"the last message must be an assistant's, got the role {last['role']}")
    if last.get("tool_calls"):
        raise _refused("the last message must be text that can go on, got one with tool_calls")
    return [*messages[:-1], {**last, **_marked(last)}]


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        return {"content": content + _PLACE + _BLANK}
    if isinstance(content, list):
        texts = [i for i, part in enumerate(content) if part.get("text", "").strip()]
        if texts:
            part = content[texts[-1]]
            part = {**part, "text": part["text"] + _PLACE + _BLANK}
            return {"content": [*content[: texts[-1]], part, *content[texts[-1] + 1 :]]}
    reasoning = message.get("reasoning_content", "")
    if reasoning.strip():
        return dict.fromkeys(("reasoning_content", "thinking"), reasoning + _PLACE + _BLANK)
    raise _refused("the last message must have text that can go on, in its content or its reasoning; got none")


def cut(text: str) -> str:
    """A rendered text up to the mark. Blanks before it stay unless the template trims messages."""
    place = text.rfind(_PLACE)
    if place < 0:
        raise InputError(
            "chat_template_refused", "the chat template leaves the last message out, so it cannot go on from there"
        )
    return text[:place] if text.startswith(_BLANK, place + 1) else text[:place].rstrip()


def _refused(rule: str) -> InputError:
    return InputError("messages_invalid", f"with continue_final_message {rule}")
