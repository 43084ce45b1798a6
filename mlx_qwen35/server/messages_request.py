"""A request of Anthropic's messages API -> messages and options of `generate`."""

from collections.abc import Iterator
from typing import Any

from mlx_qwen35.engine.options import GenerationOptions
from mlx_qwen35.prompt.messages import MOST_TOOLS
from mlx_qwen35.server import asked
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import MISSING, Fields
from mlx_qwen35.server.media import read_media, read_pages
from mlx_qwen35.server.service import Service

BILLING = "x-anthropic-billing-header"  # Claude Code's first line of the system prompt, another one in each request
IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_PARTS = ("text", "image", "document")
# Codes of a PDF that came whole and shows no pages.
_UNREADABLE = (
    "media_empty", "media_not_opened", "media_damaged", "media_too_large", "aspect_ratio_exceeded", "document_locked",
    "document_too_slow", "package_missing",
)  # fmt: skip
UNREAD = "(a document of a kind that this model cannot read)"
CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # of tools, as OpenAI's API names them
DECLINED = {
    "container": "no code runs here",
    "mcp_servers": "this server calls no others",
    "fallbacks": "there is one model",
    "compaction": "a client shortens its own history",
}
THREADLESS = "thread_unsupported_request"  # code by which Anthropic's SDK learns to send the whole history instead
# What changes nothing of an answer, in a request and in a block of it: what was read is kept without being asked.
_IDLE = ("metadata", "service_tier", "cache_control", "inference_geo", "diagnostics")
_BLOCK_IDLE = ("cache_control", "citations")

Message = dict[str, Any]


def conversation(body: Fields, service: Service) -> list[Message]:
    """The messages, the system prompt's blocks in front, each a system message: a blank line will stand between."""
    found = [_system(text) for text in map(_without_billing, _texts(body, "system", "")) if text]
    messages = body.objects("messages", most=asked.MOST_MESSAGES)
    if not messages:
        raise body.error("messages", "must not be empty", code="messages_invalid")
    for message in messages:
        role = message.choice("role", ("user", "assistant", "system"))
        if role == "assistant":
            found.append(_assistant(message))
        elif role == "system":
            found += map(_system, _texts(message, "content"))
        else:
            found += _user(message, service)
        message.done()
    if not found:
        raise body.error("messages", "must hold some content", code="messages_invalid")
    return found


def options(body: Fields, service: Service) -> dict[str, Any]:
    """The options of `generate`, but for the length. The last look at a body."""
    found = asked.sampling(body, service) | asked.stops(body, "stop_sequences") | _tools(body) | _output(body)
    for name, why in DECLINED.items():
        body.refuse(name, why)
    if body.any("thread", None):
        raise body.error("thread", "is not supported: nothing is kept between requests", code=THREADLESS)
    body.refuse("speed", "there is one speed", idle=("standard",))
    _keep_history(body)
    body.ignore(*_IDLE)
    asked.settle(body)
    return found


# --- messages ---------------------------------------------------------------------------------------------------------


def _without_billing(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(BILLING) else text


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _blocks(owner: Fields, name: str, default: Any = MISSING) -> list[Fields]:
    """Content: a list of blocks, or a text, which is one."""
    value = owner.any(name, default)
    if isinstance(value, str):
        return [Fields({"type": "text", "text": value}, owner.place(name))]
    if not isinstance(value, list):
        raise owner.error(name, "must be a string or a list of blocks", value)
    return owner.objects(name)


def _texts(owner: Fields, name: str, default: Any = MISSING) -> list[str]:
    """The texts of content that may hold nothing else."""
    found = []
    for block in _blocks(owner, name, default):
        block.choice("type", ("text",))
        found.append(_text(block)["text"])
    return found


def _text(block: Fields) -> Message:
    part = {"type": "text", "text": block.text("text")}
    block.ignore(*_BLOCK_IDLE)
    block.done()
    return part


def _image(block: Fields, service: Service) -> Message:
    source = block.object("source")
    if source.choice("type", ("base64", "url")) == "url":
        url, name = source.text("url"), "url"
    else:
        url, name = f"data:{source.choice('media_type', IMAGES)};base64,{source.text('data')}", "data"
    source.done()
    block.refuse("transformations", "images are resized as the model needs it")
    block.ignore(*_BLOCK_IDLE)
    block.done()
    return {"type": "image", "image": read_media(service.processor, "image", url, source.place(name), service.options)}


def _document(block: Fields, service: Service, in_result: bool) -> list[Message]:
    """A document of plain text, or the pages of a PDF. Of one that cannot be read a result tells so: it stays in the
    history.
    """
    try:
        parts = _source(block.object("source"), service)
    except ApiError as error:
        if not in_result or error.code not in _UNREADABLE:
            raise
        parts = [{"type": "text", "text": UNREAD}]
    told = [text for name in ("title", "context") if (text := block.text(name, None))]
    block.ignore(*_BLOCK_IDLE)
    block.done()
    if len(parts) == 1:
        return [{"type": "text", "text": "\n\n".join([*told, parts[0]["text"]])}]
    return [*({"type": "text", "text": f"{text}\n\n"} for text in told), *parts]


def _source(source: Fields, service: Service) -> list[Message]:
    kind = source.choice("type", ("text", "base64"))
    if kind == "text":
        return [{"type": "text", "text": source.text("data")}]
    source.choice("media_type", ("application/pdf",))
    return read_pages(service.processor, source.text("data"), source.place("data"), service.options)


def _part(block: Fields, service: Service, in_result: bool = False) -> list[Message]:
    kind = block.choice("type", _PARTS)
    if kind == "document":
        return _document(block, service, in_result)
    return [_text(block) if kind == "text" else _image(block, service)]


def _user(message: Fields, service: Service) -> Iterator[Message]:
    """A user's message. Results of calls are messages of their own, where they stand."""
    parts: list[Message] = []
    for block in _blocks(message, "content"):
        if block.choice("type", (*_PARTS, "tool_result")) != "tool_result":
            parts += _part(block, service)
            continue
        if parts:
            yield {"role": "user", "content": parts}
            parts = []
        yield _result(block, service)
    if parts:
        yield {"role": "user", "content": parts}


def _result(block: Fields, service: Service) -> Message:
    """The result of a call. That it is an error is told in its text: the chat template has no other place for it."""
    call, parts = block.text("tool_use_id"), []
    if block.flag("is_error", False):
        parts.append({"type": "text", "text": "Error: "})
    for part in _blocks(block, "content", ""):
        parts += _part(part, service, in_result=True)
    block.ignore(*_BLOCK_IDLE)
    block.done()
    return {"role": "tool", "tool_call_id": call, "content": parts}


def _assistant(message: Fields) -> Message:
    """An assistant's turn. Redacted thinking is another model's, which this one cannot read."""
    found: dict[str, list[Any]] = {"text": [], "thinking": [], "redacted_thinking": [], "tool_use": []}
    for block in _blocks(message, "content"):
        kind = block.choice("type", found)
        read = {"tool_use": _call, "redacted_thinking": lambda block: block.text("data")}
        found[kind].append(read[kind](block) if kind in read else block.text(kind))
        block.ignore("signature", "caller", *_BLOCK_IDLE)
        block.done()
    turn: Message = {"role": "assistant", "content": "".join(found["text"])}
    if found["thinking"]:
        turn["reasoning_content"] = "".join(found["thinking"])
    return turn | ({"tool_calls": found["tool_use"]} if found["tool_use"] else {})


def _call(block: Fields) -> Message:
    if not isinstance(given := block.any("input"), dict):
        raise block.error("input", "must be an object", given)
    return {"id": block.text("id"), "type": "function", "function": {"name": block.text("name"), "arguments": given}}


# --- options ----------------------------------------------------------------------------------------------------------


def _tools(body: Fields) -> dict[str, Any]:
    tools = [_tool(tool) for tool in body.objects("tools", [], most=MOST_TOOLS)]
    choice = body.object("tool_choice", None) or Fields({"type": "auto"}, "tool_choice")
    kind = choice.choice("type", (*CHOICES, "tool"))
    single = choice.flag("disable_parallel_tool_use", False)
    wanted = CHOICES.get(kind) or choice.text("name")
    choice.done()
    if kind == "tool" and wanted not in (tool["function"]["name"] for tool in tools):
        raise choice.error("name", "must be the name of one of the tools", wanted)
    usual = Fields({"tools": tools, "tool_choice": wanted, "parallel_tool_calls": not single})
    found = asked.tools(usual)
    body.about |= usual.about
    return found


def _tool(tool: Fields) -> Message:
    """A function in OpenAI's form. Tools that Anthropic's servers run are refused."""
    if (kind := tool.text("type", "custom")) != "custom":
        raise tool.error("type", "must be custom: this server runs no tools itself", kind, "unsupported_field")
    name = tool.text("name")
    if not isinstance(schema := tool.any("input_schema"), dict):
        raise tool.error("input_schema", "must be a JSON schema, which is an object", schema)
    told = {"description": text} if (text := tool.text("description", None)) else {}
    strict = {"strict": True} if tool.flag("strict", False) else {}
    tool.refuse("defer_loading", "every tool is in the prompt")
    tool.refuse("input_examples", "the chat template has no place for them")
    tool.refuse("allowed_callers", "the model alone calls", idle=([], ["direct"]))
    tool.ignore("cache_control", "eager_input_streaming")
    tool.done()
    return {"type": "function", "function": {"name": name, **told, "parameters": schema, **strict}}


def _output(body: Fields) -> dict[str, Any]:
    """The form of the answer, and how long is thought about it."""
    config = body.object("output_config", None) or Fields({}, "output_config")
    effort = asked.EFFORTS.get(config.choice("effort", ("low", "medium", "high", "xhigh", "max"), ""))
    form = config.object("format", None) or body.object("output_format", None)
    config.done()
    found = _thinking(body, effort)
    if form:
        form.choice("type", ("json_schema",))
        found |= form.option("schema", GenerationOptions, "json_schema")
        form.any("schema")
        form.done()
        body.about |= dict.fromkeys(("grammar_invalid", "package_missing"), form.place("schema"))
    return found


def _thinking(body: Fields, effort: str | None) -> dict[str, Any]:
    """Without any of these fields nothing is thought: clients that ask for none expect text first."""
    given = body.object("thinking", None)
    if given is None:
        return {"reasoning_effort": effort} if effort else {"enable_thinking": False}
    kind = given.choice("type", ("enabled", "disabled", "adaptive"))
    given.choice("display", ("summarized", "omitted"), None)
    found: dict[str, Any] = {"enable_thinking": False} if kind == "disabled" else {"reasoning_effort": effort or "high"}
    if kind == "enabled":
        budget, most = given.whole("budget_tokens", least=1), body.whole("max_tokens", None, least=1)
        if most and budget >= most:
            raise given.error("budget_tokens", f"must be below max_tokens, {most:,}", budget)
        found = {"thinking_budget": budget}
    given.done()
    return found


def _keep_history(body: Fields) -> None:
    """Earlier thinking is left out by the chat template itself. Another edit of the history is not made."""
    if not (management := body.object("context_management", None)):
        return
    for edit in management.objects("edits", []):
        if not (kind := edit.text("type")).startswith("clear_thinking"):
            raise edit.error("type", "is not supported: the history is read as it is", kind, "unsupported_field")
    management.done()
