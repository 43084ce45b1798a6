"""GET /v1/models and /v1/models/{id}: the one model."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.service import Service

_STARTED = int(time.time())


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(request.app.state.service)]})


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    if request.path_params["name"] != service.name:
        raise ApiError(404, "model_not_found", f"there is no model of that name; this one is {service.name}", "model")
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "mlx_qwen35",
        "max_model_len": service.context,
    }
