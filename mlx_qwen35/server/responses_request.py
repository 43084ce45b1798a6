"""A request of OpenAI's responses API -> messages and options of `generate`. Nothing is stored: `input` is all."""

import functools
from typing import Any

from mlx_qwen35.engine.options import GenerationOptions
from mlx_qwen35.prompt.messages import MOST_TOOLS
from mlx_qwen35.server import asked
from mlx_qwen35.server.fields import LOG, Fields
from mlx_qwen35.server.history import DETAILS, read_detail, read_file
from mlx_qwen35.server.service import Service

PLAIN = "plain:"  # before reasoning that a client carries as encrypted_content: this server keeps no secret
ENCRYPTED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"
# What `include` may name: the rest are results of tools that this server does not have, so they are never missed.
INCLUDE = (
    ENCRYPTED, LOGPROBS, "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
)  # fmt: skip
# Tools that clients such as Codex offer with every request: OpenAI's servers run them, or they are no functions. What
# begins like this is left out.
LEFT_OUT = (
    "apply_patch", "code_interpreter", "computer", "custom", "file_search", "image_generation", "local_shell", "mcp",
    "namespace", "programmatic_tool_calling", "shell", "tool_search", "web_search",
)  # fmt: skip
STATELESS = "this server stores no responses. Send the whole history as input"
DECLINED = {
    "previous_response_id": STATELESS,
    "conversation": STATELESS,
    "background": STATELESS,
    "prompt": "this server stores no prompts",
    "max_tool_calls": "this server calls no tools itself",
    "top_logprobs": "ask /v1/chat/completions for log-probabilities",
    "context_management": "the history is read as it is",
    "moderation": "this server judges no text",
}
_IDLE = ("prompt_cache_options", "client_metadata", "access_programs", "image")  # they change nothing of an answer

Message = dict[str, Any]


def conversation(body: Fields, service: Service) -> list[Message]:
    """The messages. Items of an assistant that follow each other are one message, as its template writes them."""
    instructions = body.text("instructions", None)
    found: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given := body.any("input"), str):
        return [*found, {"role": "user", "content": given}]
    if not (items := body.objects("input", most=asked.MOST_MESSAGES)):
        raise body.error("input", "must not be empty", given, "messages_invalid")
    for item in items:
        message = _item(item, service)
        if message["role"] == "assistant" and found and found[-1]["role"] == "assistant":
            _join(found[-1], message)
        else:
            found.append(message)
    return found


def options(body: Fields, service: Service) -> dict[str, Any]:
    """The options of `generate`. The last look at a body."""
    found = asked.most_tokens(body, "max_output_tokens") | asked.sampling(body, service)
    found |= _tools(body) | _form(body) | _reasoning(body)
    for name, why in DECLINED.items():
        body.refuse(name, why)
    body.refuse("truncation", "the history is read as it is. Shorten it", idle=("disabled",))
    for i, name in enumerate(body.items("include", [])):
        if name not in INCLUDE or name == LOGPROBS:
            raise body.error(f"include.{i}", "is not supported: there is no such thing here", name, "unsupported_field")
    body.ignore(*_IDLE)
    asked.settle(body)
    return found


# --- input ------------------------------------------------------------------------------------------------------------


def _item(item: Fields, service: Service) -> Message:
    kind = item.choice("type", ("message", "reasoning", "function_call", "function_call_output"), "message")
    if kind == "message":
        message = _message(item, service)
    elif kind == "reasoning":
        message = {"role": "assistant", "content": "", "reasoning_content": _thought(item)}
    elif kind == "function_call":
        message = {"role": "assistant", "content": "", "tool_calls": [_call(item)]}
    else:
        message = {"role": "tool", "tool_call_id": item.text("call_id"), "content": _content(item, "output", service)}
    item.ignore("id", "status", "phase", "caller", "namespace", "name")
    item.done()
    return message


def _join(turn: Message, more: Message) -> None:
    turn["content"] += more["content"]
    for name in more.keys() & {"reasoning_content", "tool_calls"}:
        turn[name] = turn[name] + more[name] if name in turn else more[name]


def _message(item: Fields, service: Service) -> Message:
    role = item.choice("role", ("user", "assistant", "system", "developer"))
    content = _content(item, "content", service)
    if role == "assistant" and not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return {"role": role, "content": content}


def _content(owner: Fields, name: str, service: Service) -> Any:
    value = owner.any(name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise owner.error(name, "must be a string or a list of parts", value)
    return [read for part in owner.objects(name) for read in _part(part, service)]


def _part(part: Fields, service: Service) -> list[Message]:
    kind = part.choice("type", ("input_text", "output_text", "refusal", "input_image", "input_file"))
    if kind == "input_file":
        part.refuse("file_url", "send a data: URI as file_data")
        read = read_file(part, service)
        part.ignore("detail")
    elif kind != "input_image":
        read = [{"type": "text", "text": part.text("refusal" if kind == "refusal" else "text")}]
        part.ignore("annotations", "logprobs")
    else:
        part.refuse("file_id", "this server stores no files. Send a data: URI as image_url")
        detail, url = part.choice("detail", DETAILS, "auto"), part.text("image_url")
        read = [{"type": "image", "image": read_detail(service, "image", url, part.place("image_url"), detail)}]
    part.ignore("prompt_cache_breakpoint")
    part.done()
    return read


def _thought(item: Fields) -> str:
    """The text of a reasoning item: its content, what a client carries for it, or its summary."""
    texts = {name: [part.text("text") for part in item.objects(name, [])] for name in ("content", "summary")}
    carried = item.text("encrypted_content", "")
    if not texts["content"] and carried.startswith(PLAIN):
        return carried.removeprefix(PLAIN)
    return "\n\n".join(texts["content"] or texts["summary"])


def _call(item: Fields) -> Message:
    function = {"name": item.text("name"), "arguments": item.text("arguments")}
    return {"id": item.text("call_id"), "type": "function", "function": function}


# --- options ----------------------------------------------------------------------------------------------------------


def _tools(body: Fields) -> dict[str, Any]:
    tools = [_tool(tool) for tool in body.objects("tools", [], most=MOST_TOOLS) if _is_offered(tool)]
    choice = body.any("tool_choice", "auto")
    if not isinstance(choice, str):
        named = body.object("tool_choice")
        named.choice("type", ("function",))
        choice = named.text("name")
        named.done()
    single = not body.flag("parallel_tool_calls", True)
    usual = Fields({"tools": tools, "tool_choice": choice, "parallel_tool_calls": not single})
    found = asked.tools(usual)
    body.about |= usual.about
    return found


def offered(body: Fields) -> list[Any]:
    """The tools that the model is given, as they came, of a body that was checked."""
    return [tool for tool in body.items("tools", []) if tool["type"] == "function"]


def _is_offered(tool: Fields) -> bool:
    kind = tool.text("type")
    for left in filter(kind.startswith, LEFT_OUT):
        _tell_left_out(left)
        return False
    if kind != "function":
        raise tool.error("type", "must be function: this server runs no tools itself", kind, "unsupported_field")
    return True


@functools.cache
def _tell_left_out(kind: str) -> None:
    """Once."""
    LOG.warning("tools of type %s are left out: the model is given functions alone", kind)


def _tool(tool: Fields) -> Message:
    """A function in the form of the chat API."""
    function = {"name": tool.text("name"), "description": tool.text("description", None)}
    if (schema := tool.any("parameters", None)) is not None:
        function["parameters"] = schema
    if tool.flag("strict", False):
        function["strict"] = True
    tool.refuse("defer_loading", "every tool is in the prompt")
    tool.refuse("allowed_callers", "the model alone calls", idle=([], ["direct"]))
    tool.ignore("output_schema")
    tool.done()
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _form(body: Fields) -> dict[str, Any]:
    text = body.object("text", None)
    if not text:
        return {}
    text.refuse("verbosity", "tell the model in a message", idle=("medium",))
    form = text.object("format", None)
    text.done()
    kind = form.choice("type", ("text", "json_object", "json_schema")) if form else "text"
    if not form or kind == "text":
        return {}
    if kind == "json_object":
        return {"response_format": {"type": kind}}
    form.object("schema")
    form.ignore("name", "description", "strict")
    form.done()
    body.about |= dict.fromkeys(("grammar_invalid", "package_missing", "option_conflict"), form.place("schema"))
    return form.option("schema", GenerationOptions, "json_schema")


def _reasoning(body: Fields) -> dict[str, Any]:
    """How long is thought. Without an effort as the model's template has it."""
    given = body.object("reasoning", None)
    if not given:
        return {}
    effort = asked.EFFORTS.get(given.choice("effort", asked.EFFORTS, ""))
    for name in ("summary", "generate_summary"):
        given.choice(name, ("auto", "concise", "detailed"), None)
    kept = given.choice("context", ("auto", "current_turn", "all_turns"), "auto") == "all_turns"
    given.refuse("mode", "there is one", idle=("standard",))
    given.done()
    found: dict[str, Any] = {"preserve_thinking": True} if kept else {}
    if effort:
        found |= {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
    return found
