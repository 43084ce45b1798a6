"""The application: its routes, what stands before them, and how errors are written."""

from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlx_qwen35.errors import InputError
from mlx_qwen35.server import chat, completions, messages, models, page_route, responses, status, tokens
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.guard import Guard, read_key, read_names, refusal
from mlx_qwen35.server.log import Log
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.service import Service


def make_app(options: ServerOptions, service: Service | None = None) -> Starlette:
    """The application. service: one that was started; None where it follows as app.state.service."""
    metrics = status.Metrics()
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
            Route("/health", status.health),
            Route("/metrics", status.metrics),
            Route("/", page_route.page),
            Route("/page/{name:path}", page_route.page),
        ],
        middleware=[
            Middleware(Log, metrics=metrics, with_text=options.log_text),
            Middleware(Guard, names=read_names(options), key=read_key(options)),
        ],
        exception_handlers=dict.fromkeys((ApiError, InputError, HTTPException), _refuse),
    )
    app.router.redirect_slashes = False
    app.state.service, app.state.metrics, app.state.closing = service, metrics, False
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # the router's: no such path, or not by this method
        headers = dict(error.headers or {})
        rule = f"this endpoint takes {headers['Allow']}" if "Allow" in headers else "there is no such endpoint"
        message = f"{request.method} {request.url.path[:80]}: {rule}"
        error = ApiError(error.status_code, HTTPStatus(error.status_code).name.lower(), message, None, headers)
    return refusal(request.scope, error)
