"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic has them."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_qwen35.engine.constraints.thinking import EFFORTS
from mlx_qwen35.engine.encode import encode
from mlx_qwen35.engine.options import check_options
from mlx_qwen35.engine.result import Result
from mlx_qwen35.errors import InputError
from mlx_qwen35.prompt.piece import CALL, CONTENT, REASONING
from mlx_qwen35.server import asked
from mlx_qwen35.server.block_reply import BlockReply
from mlx_qwen35.server.blocks import Block, Change
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import Fields, read_body
from mlx_qwen35.server.messages_request import conversation, options
from mlx_qwen35.server.service import Job, Service
from mlx_qwen35.server.stream import sse

SIGNATURE = "unsigned"  # of thinking: some clients send back only what has one
_BEGINS: dict[str, dict[str, Any]] = {
    REASONING: {"type": "thinking", "thinking": "", "signature": ""},
    CONTENT: {"type": "text", "text": ""},
    CALL: {"type": "tool_use", "input": {}},
}
_DELTAS = {REASONING: ("thinking_delta", "thinking"), CONTENT: ("text_delta", "text"),
           CALL: ("input_json_delta", "partial_json")}  # fmt: skip


async def messages(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request)
    stream = body.flag("stream", False)
    job = await service.off_loop(lambda: _prepared(body, service))
    reply = MessageReply(job.model, job.prompt_tokens, _shows_thinking(body))
    response = await reply.answer(request, job, stream)
    response.headers["request-id"] = reply.request_id
    return response


async def count_tokens(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request)
    return JSONResponse({"input_tokens": await service.off_loop(lambda: _counted(body, service))})


def _read(body: Fields, service: Service) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """The id of the model, the messages and the options."""
    model = asked.model(body, service)
    prompt = conversation(body, service)
    own = options(body, service)
    if prompt[-1]["role"] == "assistant":  # as Anthropic's API: the answer goes on with it
        own["continue_final_message"] = True
    return model, prompt, own


def _counted(body: Fields, service: Service) -> int:
    body.ignore("max_tokens", "stream")
    _, prompt, own = _read(body, service)
    with body.naming("messages", "tool_use_id"):
        return len(encode(service.processor, prompt, check_options(own)).tokens)


def _prepared(body: Fields, service: Service) -> Job:
    most = asked.most_tokens(body, "max_tokens") or body.any("max_tokens")
    model, prompt, own = _read(body, service)
    own |= {"model": model, **most}
    with body.naming("messages", "tool_use_id"):
        try:
            return service.prepare(prompt, **own)
        except InputError as error:
            if error.code != "thinking_budget_exceeded":
                raise
        budget = own.pop("thinking_budget")  # more than there is room for: an effort is cut to that
        effort = next(name for name, tokens in EFFORTS.items() if tokens and tokens >= min(budget, 16384))
        return service.prepare(prompt, **own, reasoning_effort=effort)


def _shows_thinking(body: Fields) -> bool:
    thinking = body.object("thinking", None)
    return not thinking or thinking.any("display", "") != "omitted"


class MessageReply(BlockReply):
    """A message, and the events that it is made of."""

    def __init__(self, model: str, prompt_tokens: int, shows_thinking: bool = True):
        super().__init__()
        name = uuid.uuid4().hex
        self.id, self.request_id, self.model, self.prompt_tokens = f"msg_{name}", f"req_{name}", model, prompt_tokens
        self.shows_thinking = shows_thinking

    @property
    def start(self) -> dict[str, Any]:
        """The message as it begins. What of the prompt is not read again is known in the end."""
        usage = {
            "input_tokens": self.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": [],
                "stop_reason": None, "stop_sequence": None, "usage": usage}  # fmt: skip

    def whole(self, result: Result) -> dict[str, Any]:
        return self.start | {"content": [self._whole(block, result) for block in self.blocks.all]} | ending(result)

    def begin(self) -> str:
        return _event("message_start", message=self.start)

    def quiet(self) -> str:
        return _event("ping")

    def changed(self, change: Change) -> Iterator[str]:
        what, block, text = change
        if what == "begin":
            yield _event("content_block_start", index=block.number, content_block=self._begin(block))
        elif what == "text":
            if self._shows(block):
                kind, name = _DELTAS[block.kind]
                yield _event("content_block_delta", index=block.number, delta={"type": kind, name: text})
        else:
            if block.kind == REASONING:
                signed = {"type": "signature_delta", "signature": SIGNATURE}
                yield _event("content_block_delta", index=block.number, delta=signed)
            yield _event("content_block_stop", index=block.number)

    def end(self, result: Result) -> Iterator[str]:
        delta = ending(result)
        yield _event("message_delta", usage=delta.pop("usage"), delta=delta)
        yield _event("message_stop")

    def failed(self, error: ApiError) -> str:
        return sse(error.anthropic(self.request_id), "error")

    def _shows(self, block: Block) -> bool:
        return block.kind != REASONING or self.shows_thinking

    def _begin(self, block: Block) -> dict[str, Any]:
        named = {"id": block.id, "name": block.name} if block.kind == CALL else {}
        return _BEGINS[block.kind] | named

    def _whole(self, block: Block, result: Result) -> dict[str, Any]:
        """A block with all that came. Of a call that is not whole the arguments that are."""
        if block.kind == CONTENT:
            return self._begin(block) | {"text": block.text}
        if block.kind == REASONING:
            thinking = block.text if self.shows_thinking else ""
            return self._begin(block) | {"thinking": thinking, "signature": SIGNATURE}
        cut = dict(result.cut.arguments) if result.cut else {}
        return self._begin(block) | {"input": json.loads(block.text) if block.whole else cut}


def ending(result: Result) -> dict[str, Any]:
    """What is known in the end alone. By max_tokens, and nothing else, clients know that a call is not whole."""
    reasons = {"tool_calls": "tool_use", "length": "max_tokens", "loop": "max_tokens"}
    reason = reasons.get(result.finish_reason, "stop_sequence" if result.stop else "end_turn")
    if result.finish_reason == "length" and result.limited_by == "context":
        reason = "model_context_window_exceeded"
    usage = {
        "input_tokens": result.prompt_tokens - result.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": result.cached_tokens,
        "output_tokens": result.generation_tokens,
        "output_tokens_details": {"thinking_tokens": result.reasoning_tokens},
    }
    reason = "max_tokens" if result.cut else reason
    return {"stop_reason": reason, "stop_sequence": result.stop or None, "usage": usage}


def _event(kind: str, **fields: Any) -> str:
    return sse({"type": kind, **fields}, kind)
