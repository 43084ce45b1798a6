"""GET /v1/models and /v1/models/{id}: the one model, alone and with each of its adapters."""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_qwen35.server.asked import unknown_model
from mlx_qwen35.server.service import Service

_STARTED = datetime.now(UTC)


async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    data = [_model(service, name) for name in service.models]
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request) -> Response:
    service: Service = request.app.state.service
    name = request.path_params["name"]
    if name not in service.models:
        raise unknown_model(service)
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    """As OpenAI has it, and as Anthropic has it; root and parent as vLLM has them: what is run, and beside what."""
    adapter = service.models[name]
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created": int(_STARTED.timestamp()),
        "created_at": _STARTED.isoformat(timespec="seconds"),
        "owned_by": "mlx_qwen35",
        "max_model_len": service.context,
        "root": adapter or service.name,
        "parent": service.name if adapter else None,
    }
