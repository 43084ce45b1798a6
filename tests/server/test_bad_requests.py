"""Bad requests of OpenAI's API: each has its status, its shape and its param, and none disturbs another request."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from serving import CLIENT, Running

from mlx_qwen35 import generate

TOOLS = json.loads((Path(__file__).parents[2] / "examples" / "tools.json").read_text())
QUESTION = [{"role": "user", "content": "What is 34 + 58?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Bad(NamedTuple):
    """Fields that break a rule, and the field that the refusal names."""

    fields: Any
    param: str | None
    code: str = "invalid_value"
    path: str = CHAT
    status: int = 400


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [*QUESTION, message]}


def shown(**part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, part]}]}


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


def called(**function: Any) -> dict[str, Any]:
    return said(role="assistant", content=None, tool_calls=[{"id": "a", "type": "function", "function": function}])


MEDIA = "messages.0.content.1.image_url"
UNSUPPORTED, CONFLICT, MISSING = "unsupported_field", "option_conflict", "missing_field"
BAD = {
    # messages
    "no messages": Bad({"messages": None}, "messages", MISSING),
    "messages that are text": Bad({"messages": "hi"}, "messages"),
    "empty messages": Bad({"messages": []}, "messages", "prompt_empty"),
    "4,097 messages": Bad({"messages": QUESTION * 4097}, "messages"),
    "a message that is text": Bad({"messages": ["hi"]}, "messages.0"),
    "an unknown role": Bad(said(role="moderator", content="hi"), "messages.1.role"),
    "the outdated role": Bad(said(role="function", name="a", content="hi"), "messages.1.role"),
    "no content": Bad(said(role="user"), "messages.1.content", MISSING),
    "content that is a number": Bad(said(role="user", content=7), "messages.1.content"),
    "an unknown part": Bad(shown(type="hologram"), "messages.0.content.1.type", "unsupported_part"),
    "a part of sound": Bad(
        shown(type="input_audio", input_audio={"data": "", "format": "wav"}), "messages.0.content.1.type",
        "unsupported_part",
    ),
    "an image that is none": Bad(shown(type="image_url", image_url={"url": "data:,hi"}), MEDIA, "media_not_opened"),
    "a path": Bad(shown(type="image_url", image_url={"url": "/etc/passwd"}), MEDIA, "media_source_invalid"),
    "a detail that is none": Bad(shown(type="image_url", image_url={"url": "data:,", "detail": "huge"}),
                                 f"{MEDIA}.detail"),
    "more pixels than the model's own": Bad(
        shown(type="image_url", image_url={"url": "data:,"}, max_pixels=4097), "messages.0.content.1.max_pixels"
    ),
    "least pixels beyond them": Bad(shown(type="image_url", image_url={"url": "data:,"}, min_pixels=4097),
                                    "messages.0.content.1.min_pixels"),
    "no frames": Bad(shown(type="video_url", video_url={"url": "data:,"}, fps=0), "messages.0.content.1.fps"),
    "a call without a name": Bad(called(arguments="{}"), "messages.1.tool_calls.0.function.name", MISSING),
    "arguments that are a list": Bad(called(name="a", arguments=[]), "messages.1.tool_calls.0.function.arguments"),
    "a result of no call": Bad(said(role="tool", tool_call_id="x", content="hi"), "messages", "messages_invalid"),
    "an outdated call": Bad(said(role="assistant", content="", function_call={"name": "a"}),
                            "messages.1.function_call", UNSUPPORTED),
    "going on with a user's message": Bad({"continue_final_message": True}, "messages", "messages_invalid"),
    "a prompt beyond the context": Bad({"messages": [{"role": "user", "content": "7 " * 20_000}]}, "messages",
                                       "context_length_exceeded"),
    # how tokens are chosen, and how many
    "n beyond 8": Bad({"n": 9}, "n"),
    "a temperature of text": Bad({"temperature": "hot"}, "temperature"),
    "a temperature beyond 2": Bad({"temperature": 2.5}, "temperature"),
    "a top_p of 0": Bad({"top_p": 0}, "top_p"),
    "a negative top_k": Bad({"top_k": -2}, "top_k"),
    "a threshold of XTC alone": Bad({"xtc_threshold": 0.2}, "xtc_threshold", "option_no_effect"),
    "XTC beyond 1": Bad({"xtc_probability": 2}, "xtc_probability"),
    "XTC of a greedy answer": Bad({"temperature": 0, "xtc_probability": 0.5}, "xtc_probability", "option_conflict"),
    "no tokens": Bad({"max_completion_tokens": 0}, "max_completion_tokens"),
    "half a token": Bad({"max_tokens": 1.5}, "max_tokens"),
    "a seed below 0": Bad({"seed": -1}, "seed"),
    "several seeds": Bad({"seed": [1, 2]}, "seed"),
    "17 stops": Bad({"stop": list("abcdefghijklmnopq")}, "stop"),
    "an empty stop": Bad({"stop": ""}, "stop"),
    "a bias of a word": Bad({"logit_bias": {"yes": 5}}, "logit_bias"),
    "a bias beyond the vocabulary": Bad({"logit_bias": {"1024": 5}}, "logit_bias"),
    "1,025 biases": Bad({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
    "21 top_logprobs": Bad({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "top_logprobs alone": Bad({"top_logprobs": 2}, "top_logprobs", "option_no_effect"),
    "a stream of text": Bad({"stream": "yes"}, "stream"),
    "stream_options without a stream": Bad({"stream_options": {"include_usage": True}}, "stream_options",
                                           "option_no_effect"),
    # thinking
    "an unknown effort": Bad({"reasoning_effort": "heroic"}, "reasoning_effort"),
    "a switch for the template alone": Bad({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools",
                                           UNSUPPORTED),
    "a budget without thinking": Bad({"enable_thinking": False, "thinking_budget": 9}, "thinking_budget", CONFLICT),
    "a budget that leaves no answer": Bad({"thinking": {"type": "enabled", "budget_tokens": 90}, "max_tokens": 100},
                                          "thinking.budget_tokens", "thinking_budget_exceeded"),
    # calls and forms
    "257 tools": Bad({"tools": TOOLS[:1] * 257}, "tools"),
    "a tool twice": Bad({"tools": TOOLS[:1] * 2}, "tools"),
    "a tool of another kind": Bad({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    "a tool without a name": Bad({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", MISSING),
    "a tool that no choice can name": Bad({"tools": [{"type": "function", "function": {"name": "none"}}]},
                                          "tools.0.function.name"),
    "a choice of an unknown tool": Bad({"tools": TOOLS, "tool_choice": "fly"}, "tool_choice"),
    "a choice without tools": Bad({"tool_choice": "required"}, "tool_choice"),
    "an unknown form": Bad({"response_format": {"type": "xml"}}, "response_format.type"),
    "a form without a schema": Bad({"response_format": {"type": "json_schema"}}, "response_format.json_schema",
                                   MISSING),
    "a schema beyond 64 KB": Bad(form({"enum": ["x" * 70_000]}), "response_format"),
    "a schema that cannot be held": Bad(form({"uniqueItems": True}), "response_format", "grammar_invalid"),
    "two forms": Bad({"guided_regex": "a", "structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice",
                     CONFLICT),
    "a form of calls": Bad({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "regex", CONFLICT),
    "a form of what has begun": Bad(
        said(role="assistant", content="b") | {"continue_final_message": True, "regex": "a"}, "continue_final_message",
        CONFLICT,
    ),
    # fields without an effect
    "sound": Bad({"modalities": ["text", "audio"]}, "modalities", UNSUPPORTED),
    "functions": Bad({"functions": [{}]}, "functions", UNSUPPORTED),
    "prediction": Bad({"prediction": {"type": "content"}}, "prediction", UNSUPPORTED),
    "a search": Bad({"web_search_options": {}}, "web_search_options", UNSUPPORTED),
    "a grammar": Bad({"guided_grammar": "a"}, "guided_grammar", UNSUPPORTED),
    # other endpoints
    "a completion of nothing": Bad({"prompt": ""}, "prompt", "prompt_empty", TEXT),
    "a completion of a mixture": Bad({"prompt": ["a", 1]}, "prompt", path=TEXT),
    "a completion of an unknown token": Bad({"prompt": [1024]}, "prompt", "tokens_invalid", TEXT),
    "too many completions": Bad({"prompt": ["a"] * 5, "n": 2}, "n", path=TEXT),
    "a suffix": Bad({"prompt": "a", "suffix": "b"}, "suffix", UNSUPPORTED, TEXT),
    "best_of": Bad({"prompt": "a", "best_of": 2}, "best_of", UNSUPPORTED, TEXT),
    "an echo": Bad({"prompt": "a", "echo": True}, "echo", UNSUPPORTED, TEXT),
    "a chat's field": Bad({"prompt": "a", "tools": TOOLS}, "tools", UNSUPPORTED, TEXT),
    "a chat's length": Bad({"prompt": "a", "max_completion_tokens": 5}, "max_completion_tokens", UNSUPPORTED, TEXT),
    "a prompt beside messages": Bad({"prompt": "a", "messages": QUESTION}, "prompt", UNSUPPORTED, "/tokenize"),
    "an unknown token": Bad({"tokens": [1, -1]}, "tokens.1", path="/detokenize"),
    "nothing to encode": Bad({}, "prompt", MISSING, "/tokenize"),
    "another model": Bad(None, "model", "model_not_found", "/v1/models/gpt-4o", 404),
    # no objects
    "a list": Bad([1], None),
}  # fmt: skip


def refused(server: Running, bad: Bad) -> Any:
    """The status and the error of a bad request."""
    if bad.fields is None:
        answer = CLIENT.get(server.url + bad.path)
    elif isinstance(bad.fields, dict) and bad.path == CHAT:
        answer = server.post(CHAT, {"messages": QUESTION, "model": "gpt-4o"} | bad.fields)
    else:
        answer = server.post(bad.path, bad.fields)
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, answer.json()


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_request_is_refused_by_its_field(nano_server: Running, bad: Bad) -> None:
    status, body = refused(nano_server, bad)
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}, body
    error = body["error"]
    assert (status, error["param"], error["code"]) == (bad.status, bad.param, bad.code), error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert isinstance(error["message"], str) and len(error["message"]) < 600


def test_a_result_of_no_call_is_named_as_the_request_has_it(nano_server: Running) -> None:
    result = {"type": "function_call_output", "call_id": "c9", "output": "21"}
    message = refused(nano_server, BAD["a result of no call"])[1]["error"]["message"]
    item = nano_server.post("/v1/responses", {"input": [result]}).json()["error"]["message"]
    assert message.startswith("tool_call_id of messages.1 ") and item.startswith("call_id ")


def test_a_good_request_among_bad_ones_gets_its_text(nano_server: Running) -> None:
    right = generate(nano_server.service.model, nano_server.service.processor, QUESTION, seed=2)
    with ThreadPoolExecutor(3) as pool:
        good = pool.submit(nano_server.post, CHAT, {"messages": QUESTION, "seed": 2})
        statuses = list(pool.map(lambda bad: refused(nano_server, bad)[0], BAD.values()))
        (choice,) = good.result().json()["choices"]
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (right.text, right.reasoning)
    assert set(statuses) == {400, 404}
