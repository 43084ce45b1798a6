"""The application: its routes, and how errors are written."""

import uuid

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_qwen35.errors import InputError
from mlx_qwen35.server import chat, completions, messages, models, responses, tokens
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.service import Service


def make_app(service: Service) -> Starlette:
    """The application in front of a service that was started."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat.chat, methods=["POST"]),
            Route("/v1/messages", messages.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
            Route("/v1/responses", responses.responses, methods=["POST"]),
            Route("/v1/completions", completions.completions, methods=["POST"]),
            Route("/v1/models", models.models),
            Route("/v1/models/{name:path}", models.model),
            Route("/tokenize", tokens.tokenize, methods=["POST"]),
            Route("/detokenize", tokens.detokenize, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys((Exception, ApiError, InputError), _refuse),
    )
    app.state.service = service
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    told = ApiError.of(error)
    if not request.url.path.startswith("/v1/messages"):
        return JSONResponse(told.openai(), told.status, told.headers)
    name = f"req_{uuid.uuid4().hex}"
    return JSONResponse(told.anthropic(name), told.status, told.headers | {"request-id": name})
