"""POST /v1/responses, as OpenAI has it, without a memory: no response is stored."""

import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from mlx_qwen35.engine.result import Result
from mlx_qwen35.prompt.piece import CALL, CONTENT
from mlx_qwen35.server import asked
from mlx_qwen35.server.block_reply import BlockReply, cut_short
from mlx_qwen35.server.blocks import Block, Change
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import Fields, read_body
from mlx_qwen35.server.responses_request import ENCRYPTED, PLAIN, conversation, offered, options
from mlx_qwen35.server.service import Job, Service
from mlx_qwen35.server.stream import sse

# Fields of a request that its response repeats, with what they are where left out.
ECHOED: dict[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None,
    "top_p": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
    "reasoning": {"effort": None, "summary": None}, "truncation": "disabled", "user": None,
}  # fmt: skip
CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}  # status -> code of a response's error


class Form(NamedTuple):
    """How the item of a block and its events are called. part, place, kind: of the text in it, if it is one."""

    item: str
    event: str
    part: str = ""
    place: str = ""
    kind: str = ""


CALLED = Form("fc", "response.function_call_arguments")
SAID = Form("msg", "response.output_text", "response.content_part", "content_index", "output_text")
THOUGHT = Form("rs", "response.reasoning_text", "response.content_part", "content_index", "reasoning_text")
SUMMED = Form("rs", "response.reasoning_summary_text", "response.reasoning_summary_part", "summary_index",
              "summary_text")  # fmt: skip


async def responses(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request)
    stream, _ = asked.streaming(body)
    job = await service.off_loop(lambda: _prepared(body, service))
    return await ResponseReply(job.model, body).answer(request, job, stream)


def _prepared(body: Fields, service: Service) -> Job:
    model = asked.model(body, service)
    prompt, own = conversation(body, service), options(body, service)
    with body.naming("input", "call_id"):
        return service.prepare(prompt, model=model, **own)


class ResponseReply(BlockReply):
    """A response, and the events that it is made of.

    Args:
        body: of the request, checked.
    """

    def __init__(self, model: str, body: Fields):
        super().__init__()
        self._hex, self._sent = uuid.uuid4().hex, 0
        reasoning = body.any("reasoning", {})
        # A client that asks for a summary shows no other reasoning, so the reasoning is told as one.
        self._thinking = SUMMED if reasoning.get("summary") or reasoning.get("generate_summary") else THOUGHT
        self._carried = ENCRYPTED in body.items("include", [])
        self._head = {
            "id": f"resp_{self._hex}", "object": "response", "created_at": int(time.time()), "model": model,
            "store": False, "previous_response_id": None, "background": False, "tools": offered(body),
        } | {name: body.any(name, usual) for name, usual in ECHOED.items()}  # fmt: skip

    def begin(self) -> str:
        return self._event("response.created", response=self._response("in_progress"))

    def quiet(self) -> str:
        return self._event("response.in_progress", response=self._response("in_progress"))

    def changed(self, change: Change) -> Iterator[str]:
        what, block, text = change
        form = self._form(block)
        place = {"item_id": self._id(block), "output_index": block.number} | ({form.place: 0} if form.place else {})
        more: dict[str, Any] = {"logprobs": []} if form is SAID else {}
        if what == "begin":
            yield self._event("response.output_item.added", output_index=block.number, item=self._item(block, False))
            if form.part:
                yield self._event(f"{form.part}.added", **place, part=_part(form, ""))
        elif what == "text":
            yield self._event(f"{form.event}.delta", **place, delta=text, **more)
        else:
            given = {"text": block.text} if form.part else {"name": block.name, "arguments": block.text}
            yield self._event(f"{form.event}.done", **place, **given, **more)
            if form.part:
                yield self._event(f"{form.part}.done", **place, part=_part(form, block.text))
            yield self._event("response.output_item.done", output_index=block.number, item=self._item(block))

    def end(self, result: Result) -> Iterator[str]:
        made = self.whole(result)
        yield self._event(f"response.{made['status']}", response=made)

    def failed(self, error: ApiError) -> str:
        told = {"code": CODES.get(error.status, "server_error"), "message": error.message}
        return self._event("response.failed", response=self._response("failed") | {"error": told})

    def whole(self, result: Result) -> dict[str, Any]:
        """The response in the end."""
        cut = cut_short(result)
        usage = {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": result.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": result.generation_tokens,
            "output_tokens_details": {"reasoning_tokens": result.reasoning_tokens},
            "total_tokens": result.prompt_tokens + result.generation_tokens,
        }
        return self._response("incomplete" if cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(block) for block in self.blocks.all],
            "usage": usage,
        }

    def _event(self, kind: str, **fields: Any) -> str:
        self._sent += 1
        return sse({"type": kind, "sequence_number": self._sent - 1, **fields}, kind)

    def _response(self, status: str) -> dict[str, Any]:
        return self._head | {"status": status, "error": None, "incomplete_details": None, "output": [], "usage": None}

    def _form(self, block: Block) -> Form:
        return {CALL: CALLED, CONTENT: SAID}.get(block.kind, self._thinking)

    def _id(self, block: Block) -> str:
        return f"{self._form(block).item}_{self._hex}_{block.number}"

    def _item(self, block: Block, ended: bool = True) -> dict[str, Any]:
        form = self._form(block)
        status = ("completed" if block.whole else "incomplete") if ended else "in_progress"
        item = {"id": self._id(block), "status": status}
        if form is CALLED:
            return item | {"type": "function_call", "call_id": block.id, "name": block.name, "arguments": block.text}
        parts = [_part(form, block.text)] if ended else []
        if form is SAID:
            return item | {"type": "message", "role": "assistant", "content": parts}
        carried = {"encrypted_content": PLAIN + block.text} if ended and self._carried else {}
        summary, content = (parts, []) if form is SUMMED else ([], parts)
        return item | {"type": "reasoning", "summary": summary, "content": content, **carried}


def _part(form: Form, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if form is SAID else {}
    return {"type": form.kind, "text": text, **more}
