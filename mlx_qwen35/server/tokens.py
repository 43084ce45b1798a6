"""POST /tokenize and /detokenize, in vLLM's form."""

from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_qwen35.engine.options import Options, PromptOptions, thinking_switch
from mlx_qwen35.server import asked
from mlx_qwen35.server.fields import Fields, read_body
from mlx_qwen35.server.history import read_message
from mlx_qwen35.server.service import Service

MOST_TOKENS = 1 << 20  # in a request


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request)
    return JSONResponse(await service.off_loop(lambda: _tokens(body, service)))


def _tokens(body: Fields, service: Service) -> dict[str, Any]:
    asked.model(body, service)
    named = body.flag("return_token_strs", False)
    encoded = _of_text if body.any("messages", None) is None else _of_messages
    found = encoded(body, service)
    texts = [service.processor.token_bytes(token).decode(errors="replace") for token in found] if named else None
    return {"count": len(found), "max_model_len": service.context, "tokens": found, "token_strs": texts}


def _of_text(body: Fields, service: Service) -> list[int]:
    """The tokens of a text by itself, control tokens included."""
    text, added = body.text("prompt"), body.flag("add_special_tokens", True)
    body.done()
    return service.processor.tokenizer.encode(text, add_special_tokens=added)


def _of_messages(body: Fields, service: Service) -> list[int]:
    """The tokens of the prompt that a chat completion with these messages has."""
    options: dict[str, Any] = body.option("continue_final_message", PromptOptions)
    options["add_generation_prompt"] = body.flag("add_generation_prompt", not options.get("continue_final_message"))
    options["enable_thinking"] = thinking_switch(cast(Options, asked.thinking(body)))
    options["tools"] = asked.tools(body).get("tools")
    messages = body.objects("messages", most=asked.MOST_MESSAGES)
    asked.settle(body)
    history = [read_message(message, service) for message in messages]
    with body.naming("messages"):
        return list(service.processor.encode_messages(history, **options).tokens)


async def detokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request)
    asked.model(body, service)
    tokens = body.items("tokens", most=MOST_TOKENS)
    body.done()
    for place, token in enumerate(tokens):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < service.processor.vocabulary:
            rule = f"must be a token id from 0 to {service.processor.vocabulary - 1}"
            raise body.error(f"tokens.{place}", rule, token)
    return JSONResponse({"prompt": await service.off_loop(lambda: service.processor.decode(tokens))})
