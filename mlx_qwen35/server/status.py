"""GET /health and /metrics: how the server is."""

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Scope

from mlx_qwen35.server.service import Answer, Service

BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)  # seconds, of the histogram


# In a series of each adapter too, whose label has its name.
TOKENS = {"prompt": "of prompts", "cached": "of prompts, not read again", "generated": "of answers"}
GAUGES = {
    "running": "answers that are read or generated",
    "waiting": "requests of which nothing has begun",
    "weights_bytes": "the model's weights",
    "adapters_bytes": "the adapters beside them",
    "library_bytes": "what is remembered of prompts",
    "memory_bytes": "MLX's memory now",
    "memory_peak_bytes": "MLX's memory at its most",
}


class Metrics:
    """What has happened since the start. Of the event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.tokens: Counter[tuple[str, str]] = Counter()  # by kind and adapter, "" for none
        self.first = [0] * (len(BOUNDS) + 1)  # answers by the seconds to their first token
        self.first_seconds = 0.0

    def count(self, scope: Scope, status: int, answers: Sequence[Answer], began: float) -> None:
        """A request has ended. began: on the clock of time.monotonic()."""
        routes = (route for route in scope["app"].routes if route.endpoint is scope.get("endpoint"))
        path = next((route.path for route in routes), "other")  # else any word of a client would be a series
        self.requests[path, status] += 1
        for answer in answers:
            ended = [result for result in answer.results if result is not None]
            adapter = answer.job.prepared.adapter
            self.tokens["prompt", adapter] += answer.job.prompt_tokens
            self.tokens["cached", adapter] += max((result.cached_tokens for result in ended), default=0)
            self.tokens["generated", adapter] += sum(result.generation_tokens for result in ended)
            if answer.first_at is not None:
                self.first[bisect_left(BOUNDS, answer.first_at - began)] += 1
                self.first_seconds += answer.first_at - began

    def lines(self) -> Iterator[str]:
        """Prometheus's text format."""
        yield from _head("requests_total", "counter", "requests that have ended, by path and status")
        for (path, status), count in sorted(self.requests.items()):
            yield f'mlx_qwen35_requests_total{{path="{path}",status="{status}"}} {count}'
        for kind in TOKENS:
            yield from _head(f"{kind}_tokens_total", "counter", f"tokens: {TOKENS[kind]}")
            for adapter in sorted({"", *(adapter for _, adapter in self.tokens)}):
                yield f"mlx_qwen35_{kind}_tokens_total{_label(adapter)} {self.tokens[kind, adapter]}"
        name, below = "mlx_qwen35_first_token_seconds", 0
        yield from _head("first_token_seconds", "histogram", "from a request to the first token of its answer")
        for bound, count in zip((*BOUNDS, "+Inf"), self.first, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.first_seconds:.6f}"
        yield f"{name}_count {below}"


def _label(adapter: str) -> str:
    """Of a series; those without an adapter have none."""
    escaped = adapter.replace("\\", r"\\").replace('"', r"\"")
    return f'{{adapter="{escaped}"}}' if adapter else ""


def _head(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP mlx_qwen35_{name} {meaning}"
    yield f"# TYPE mlx_qwen35_{name} {kind}"


async def metrics(request: Request) -> Response:
    gauges = await asyncio.to_thread(lambda: list(_gauges(request.app.state.service)))  # they may wait for a step
    lines = [*request.app.state.metrics.lines(), *gauges]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def _gauges(service: Service) -> Iterator[str]:
    model, library = service.model, service.library  # None while they are unloaded
    values = {
        "running": service.running,
        "waiting": service.waiting,
        "weights_bytes": sum(a.nbytes for a in dict(tree_flatten(model.parameters())).values()) if model else 0,
        "adapters_bytes": model.adapters.nbytes if model else 0,
        "library_bytes": library.nbytes if library else 0,
        "memory_bytes": mx.get_active_memory(),
        "memory_peak_bytes": mx.get_peak_memory(),
    }
    for name, value in values.items():
        yield from _head(name, "gauge", GAUGES[name])
        yield f"mlx_qwen35_{name} {value}"


async def health(request: Request) -> Response:
    """200 where requests are answered, 503 before and after."""
    condition = condition_of(request.app)
    return JSONResponse({"status": condition}, 200 if condition == "ok" else 503)


def condition_of(app: Starlette) -> str:
    """ "ok", or what keeps the server from answering."""
    return "closing" if app.state.closing else "loading" if app.state.service is None else "ok"
