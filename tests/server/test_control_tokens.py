"""No text of a request becomes a control token, whatever field of whatever API brings it.

The raw text of /v1/completions and /tokenize is the exception, by its purpose: it is the prompt as it is.
"""

import json
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
from serving import Running

from mlx_qwen35.server.errors import ApiError

EVERYWHERE = -1
HERE = "@"  # stands for each text, or name of a field, that a client chooses

SCHEMA = {"type": "object", "title": HERE, "description": HERE, "required": [HERE],
          "properties": {HERE: {"type": "string", "description": HERE, "enum": [HERE], "default": HERE}}}  # fmt: skip
CALL = {
    "id": HERE,
    "type": "function",
    "function": {"name": "look", "arguments": json.dumps({HERE: HERE, "b": [HERE]})},
}
TOOL = {"type": "function", "function": {"name": "look", "description": HERE, "parameters": SCHEMA}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": HERE, "user": HERE, "stop": [HERE], "metadata": {HERE: HERE},
        "tools": [TOOL, {"type": "function", "function": {"name": HERE, "parameters": {}}}],
        "messages": [
            {"role": "system", "content": HERE},
            {"role": "developer", "content": [{"type": "text", "text": HERE}]},
            {"role": "user", "name": HERE, "content": [{"type": "text", "text": HERE}, {"type": "text", "text": HERE}]},
            {"role": "assistant", "reasoning_content": HERE, "content": HERE, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": HERE, "content": HERE},
            {"role": "assistant", "reasoning": HERE, "content": [{"type": "text", "text": HERE}]},
            {"role": "user", "content": HERE},
        ],
    },
    "/v1/messages": {
        "model": HERE, "max_tokens": 1, "stop_sequences": [HERE], "metadata": {"user_id": HERE},
        "system": [{"type": "text", "text": HERE}, {"type": "text", "text": HERE}],
        "tools": [{"name": "look", "description": HERE, "input_schema": SCHEMA}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": HERE}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": HERE, "signature": HERE},
                {"type": "text", "text": HERE},
                {"type": "tool_use", "id": HERE, "name": "look", "input": {HERE: HERE}},
            ]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": HERE, "content": HERE}]},
            {"role": "assistant", "content": HERE},
            {"role": "user", "content": HERE},
        ],
    },
    "/v1/responses": {
        "model": HERE, "instructions": HERE, "user": HERE, "store": False,
        "tools": [{"type": "function", "name": "look", "description": HERE, "parameters": SCHEMA, "strict": False}],
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": HERE}]},
            {"type": "function_call", "call_id": HERE, "name": "look", "arguments": json.dumps({HERE: HERE})},
            {"type": "function_call_output", "call_id": HERE, "output": HERE},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": HERE}]},
            {"role": "user", "content": HERE},
        ],
    },
}  # fmt: skip


def filled(value: Any, turn: Iterator[str]) -> Any:
    """The value with the next text of `turn` in each place."""
    if isinstance(value, dict):
        return {filled(name, turn): filled(item, turn) for name, item in value.items()}
    if isinstance(value, list):
        return [filled(item, turn) for item in value]
    if isinstance(value, str) and value.startswith("{"):  # arguments of a call
        return json.dumps(filled(json.loads(value), turn))
    return next(turn) if value == HERE else value


def texts(place: int, text: str) -> Iterator[str]:
    """The text in one place, w in all others. Place 0 is none, EVERYWHERE is all."""
    return (text if place in (number, EVERYWHERE) else "w" for number in count(1))


@pytest.fixture
def control(nano_server: Running) -> dict[str, int]:
    """The strings of the control tokens, and their ids."""
    decoder = nano_server.service.processor.tokenizer.backend.get_added_tokens_decoder()
    return {token.content: number for number, token in decoder.items()}


@pytest.fixture
def prompts(nano_server: Running, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that were made ready. Nothing is generated."""
    seen: list[list[int]] = []
    prepare = nano_server.service.prepare

    def watched(*given: Any, **options: Any) -> None:
        seen.append(list(prepare(*given, **options).prepared.prompt.tokens))
        raise ApiError(400, "seen", "")

    monkeypatch.setattr(nano_server.service, "prepare", watched)
    return seen


Asked = Callable[[str, int], list[int]]


@pytest.fixture
def asked(nano_server: Running, control: dict[str, int], prompts: list[list[int]]) -> Asked:
    """(path, place of the poison) -> the control tokens of the prompt; none where the request is refused."""
    poison, ids = "".join(control), set(control.values())
    assert len(control) > 10

    def ask(path: str, place: int) -> list[int]:
        prompts.clear()
        nano_server.post(path, filled(BODIES[path], texts(place, poison)))
        return [token for prompt in prompts for token in prompt if token in ids]

    return ask


@pytest.mark.parametrize("path", BODIES)
def test_texts_of_a_request_hold_no_control_tokens(asked: Asked, path: str) -> None:
    assert asked(path, EVERYWHERE) == asked(path, 0) != []


@pytest.mark.full
@pytest.mark.parametrize("path", BODIES)
def test_no_single_text_of_a_request_holds_control_tokens(asked: Asked, path: str) -> None:
    usual, places = asked(path, 0), str(BODIES[path]).count(HERE)
    found = [asked(path, place) for place in range(1, places + 1)]
    assert sum(map(bool, found)) >= places - 2 > 15  # ids of a call and its result that differ are refused
    assert [place for place, tokens in enumerate(found, start=1) if tokens not in ([], usual)] == []


@pytest.mark.full
@pytest.mark.parametrize("form", ["choice", "json_schema", "regex"])
def test_a_form_of_the_answer_writes_control_tokens_as_text(
    nano_server: Running, control: dict[str, int], form: str
) -> None:
    wanted = "a <|im_end|> b </think> c"
    forms = {"json_schema": {"const": wanted}, "choice": [wanted], "regex": wanted.replace("|", r"\|")}
    asked = {"messages": [{"role": "user", "content": "Hello"}], "enable_thinking": False, form: forms[form]}
    choice = nano_server.post("/v1/chat/completions", asked | {"logprobs": True}).json()["choices"][0]
    assert choice["message"]["content"].strip('"') == wanted
    assert [token["token"] for token in choice["logprobs"]["content"] if token["token"] in control] == ["<|im_end|>"]
