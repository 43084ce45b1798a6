"""GET /v1/models and /v1/models/{id}: the one model."""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_qwen35.server.asked import unknown_model
from mlx_qwen35.server.service import Service

_STARTED = datetime.now(UTC)


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(request.app.state.service)]})


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    if request.path_params["name"] != service.name:
        raise unknown_model(service)
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    """As OpenAI has it, and as Anthropic has it."""
    return {
        "id": service.name,
        "object": "model",
        "type": "model",
        "display_name": service.name,
        "created": int(_STARTED.timestamp()),
        "created_at": _STARTED.isoformat(timespec="seconds"),
        "owned_by": "mlx_qwen35",
        "max_model_len": service.context,
    }
