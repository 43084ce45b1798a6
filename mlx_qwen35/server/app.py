"""The application: its routes, and how errors are written."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_qwen35.errors import InputError
from mlx_qwen35.server import chat, page_route
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.service import Service


def make_app(service: Service) -> Starlette:
    """The application in front of a service that was started."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat.chat, methods=["POST"]),
            Route("/", page_route.page),
            Route("/page/{name:path}", page_route.page),
        ],
        exception_handlers=dict.fromkeys((Exception, ApiError, InputError), _refuse),
    )
    app.state.service = service
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    told = ApiError.of(error)
    body = told.anthropic() if request.url.path.startswith("/v1/messages") else told.openai()
    return JSONResponse(body, told.status, told.headers)
