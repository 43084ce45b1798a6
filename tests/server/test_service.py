"""The service between the event loop and its engine thread: who may come in, and how it ends."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from server.lanes import ENDLESS, QUESTION
from serving import Running

from mlx_qwen35.engine.result import Result
from mlx_qwen35.load import load
from mlx_qwen35.options import spelled
from mlx_qwen35.server import service as serving
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.service import Answer, Service

LONG = {"max_tokens": 2000, "mtp": "off", **ENDLESS}


async def whole(answer: Answer) -> list[Result]:
    async for _ in answer:
        pass
    return [result for result in answer.results if result is not None]


def served(use: Callable[[Service], Coroutine[Any, Any, None]], **options: Any) -> Service:
    service = Service(*load("nano"), ServerOptions(**options), "nano", load=lambda: load("nano"))
    service.start()
    try:
        asyncio.run(asyncio.wait_for(use(service), 120))
    finally:
        service.close()
    return service


def test_too_many_that_are_made_ready_are_refused_before_they_are() -> None:
    async def use(service: Service) -> None:
        go = threading.Event()
        ready = [asyncio.ensure_future(service.off_loop(go.wait)) for _ in range(serving.QUEUE + 1)]
        await asyncio.sleep(0)
        one_more = asyncio.ensure_future(service.off_loop(go.wait))
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(ApiError) as refused:
            await one_more
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        await asyncio.gather(*ready)
        assert await service.off_loop(lambda: 7) == 7

    served(use, rows=1)


def test_options_of_the_server_are_told_as_flags_and_fields_as_such(nano_server: Running) -> None:
    def told() -> tuple[str, str]:
        return spelled("rope_scaling", "yarn"), spelled("max_pixels")

    assert asyncio.run(nano_server.service.off_loop(told)) == ("--rope-scaling yarn", "max_pixels")


def test_too_many_are_refused_and_those_that_wait_are_answered() -> None:
    async def use(service: Service) -> None:
        running = aiter(service.submit(service.prepare(QUESTION, **LONG)))
        await anext(running)
        job = service.prepare(QUESTION, max_tokens=1)
        queued = [service.submit(service.prepare(QUESTION, max_tokens=1)) for _ in range(serving.QUEUE)]
        with pytest.raises(ApiError) as refused:
            service.submit(job)
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        assert int(refused.value.headers["Retry-After"]) > 0
        await running.aclose()
        for answer in queued:
            assert [result.generation_tokens for result in await whole(answer)] == [1]
        assert [result.error for result in await whole(service.submit(job))] == [None]
        assert (service.waiting, service.running) == (0, 0)

    served(use, rows=1)


def test_a_burst_may_fill_the_rows_and_the_queue() -> None:
    async def use(service: Service) -> None:
        job = service.prepare(QUESTION, max_tokens=1)
        answers = [service.submit(job) for _ in range(serving.QUEUE + 2)]
        assert len([result for answer in answers for result in await whole(answer)]) == len(answers)

    served(use, rows=2)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    async def use(service: Service) -> None:
        with pytest.raises(Exception) as refused:
            service.prepare([5] * 100)
        assert ApiError.of(refused.value).code == "context_length_exceeded"
        (result,) = await whole(service.submit(service.prepare([5] * 90, regex="[ab]{90}")))
        assert (result.finish_reason, result.limited_by, result.generation_tokens) == ("length", "context", 10)

    served(use, context=100)


def test_closing_ends_what_runs_and_refuses_what_waits() -> None:
    async def use(service: Service) -> None:
        running, waiting = (service.submit(service.prepare(QUESTION, **LONG)) for _ in range(2))
        events = aiter(running)
        await anext(events)
        closing = asyncio.ensure_future(asyncio.to_thread(service.close))
        async for _ in events:
            pass
        (ended,), (refused,) = [result for result in running.results if result is not None], await whole(waiting)
        assert (ended.finish_reason, ended.error) == ("interrupted", None)
        assert ApiError.of(refused.error or Exception()).code == "closing"
        await closing
        with pytest.raises(ApiError) as late:
            service.submit(service.prepare(QUESTION))
        assert late.value.status == 503

    served(use, rows=1)


def test_time_passes_from_the_preparation_on() -> None:
    now = [0.0]

    async def use() -> None:
        job = service.prepare(QUESTION)
        now[0] = 10.0
        (result,) = await whole(service.submit(job))
        assert ApiError.of(result.error or Exception()).code == "request_timeout"

    service = Service(*load("nano"), ServerOptions(timeout=10), "nano", clock=lambda: now[0])
    service.start()
    try:
        asyncio.run(asyncio.wait_for(use(), 60))
    finally:
        service.close()


def test_closing_refuses_what_is_on_its_way_and_loads_no_model_for_it() -> None:
    now, gate, loads = [0.0], threading.Event(), []

    async def use() -> None:
        job = service.prepare(QUESTION)
        now[0] = 61.0
        while service.model:
            service.do(lambda: None)
            await asyncio.sleep(0.01)
        service.do(lambda: gate.wait(60) and 1 / 0)
        answer = service.submit(job)
        closing = asyncio.ensure_future(asyncio.to_thread(service.close))
        with pytest.raises(ApiError) as late:
            while True:
                await service.off_loop(int)
        gate.set()
        (result,) = await whole(answer)
        await closing
        assert late.value.code == ApiError.of(result.error or Exception()).code == "closing"
        assert not loads

    options = ServerOptions(idle_unload=1)
    service = Service(*load("nano"), options, "nano", lambda: loads.append(1) or load("nano"), lambda: now[0])
    service.start()
    asyncio.run(asyncio.wait_for(use(), 60))
