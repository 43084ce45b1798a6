"""POST /v1/chat/completions."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlx_qwen35.engine.options import GenerationOptions, PromptOptions
from mlx_qwen35.server import asked
from mlx_qwen35.server.fields import Fields, read_body
from mlx_qwen35.server.history import read_message
from mlx_qwen35.server.replies import Kind, Wanted, reply
from mlx_qwen35.server.service import Service
from mlx_qwen35.server.spoken import Spoken

_KIND = Kind("chatcmpl", "chat.completion", "chat.completion.chunk", Spoken)


async def chat(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request)
    return await reply(request, await service.off_loop(lambda: _read(body, service)), _KIND)


def _read(body: Fields, service: Service) -> Wanted:
    model = asked.model(body, service)
    stream, usage = asked.streaming(body)
    n = body.whole("n", 1, least=1, most=asked.MOST_ANSWERS)
    options = asked.sampling(body, service)
    options |= asked.most_tokens(body, "max_completion_tokens", "max_tokens") | asked.stops(body)
    options |= asked.thinking(body) | asked.tools(body) | asked.form(body) | _logprobs(body)
    options |= _continued(body) | body.option("loop_guard", GenerationOptions)
    messages = body.objects("messages", most=asked.MOST_MESSAGES)
    asked.settle(body)
    history = [read_message(message, service) for message in messages]
    with body.naming("messages"):
        return Wanted([service.prepare(history, n, model, **options)], stream, usage)


def _logprobs(body: Fields) -> dict[str, Any]:
    wanted, top = body.flag("logprobs", False), body.whole("top_logprobs", 0, least=0, most=asked.MOST_TOP)
    if top and not wanted:
        raise body.error("top_logprobs", "must be given with logprobs", code="option_no_effect")
    return {"logprobs": True, "top_logprobs": top} if wanted else {}


def _continued(body: Fields) -> dict[str, Any]:
    options = body.option("continue_final_message", PromptOptions)
    go_on = options.get("continue_final_message", False)
    if body.flag("add_generation_prompt", None) is go_on:
        rule = "must be the opposite of continue_final_message"
        raise body.error("add_generation_prompt", rule, code="option_conflict")
    body.about |= {"option_conflict": "continue_final_message"} if go_on else {}
    return options
