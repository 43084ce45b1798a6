"""The body of a request: JSON in UTF-8, limited in size, time and depth before anything looks at it.

Each refusal is an ApiError: 415 for another media type, 413 for too many bytes, 408 for too slow ones, 400 for JSON
that is broken, too deep, or means different things to different readers (a name twice, NaN).
"""

import asyncio
import json
import math
import re
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.types import Receive

from mlx_qwen35.server.errors import ApiError

MAX_BYTES = 32_000_000
MAX_DEPTH = 64
MAX_VALUES = 2_000_000  # as Python's objects they take some hundred times the bytes of their JSON
SECONDS = 60.0  # for all of a body
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class ClientLeft(Exception):
    """The connection ended before the body did."""


async def read_body(headers: Headers, receive: Receive) -> bytes:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "media_type_wrong", "a body must be plain JSON: send Content-Type: application/json")
    _check_length(int(headers.get("content-length", 0)))
    try:
        async with asyncio.timeout(SECONDS):
            return await _received(receive)
    except TimeoutError:
        rule = f"a body must arrive within {SECONDS:g} seconds; this one did not"
        raise ApiError(408, "body_timeout", rule, headers={"Connection": "close"}) from None


async def _received(receive: Receive) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientLeft
        body += message.get("body", b"")
        _check_length(len(body))
        more = message.get("more_body", False)
    return bytes(body)


def _check_length(length: int) -> None:
    if length > MAX_BYTES:
        came = f"this one has {length:,} or more"
        raise ApiError(413, "body_too_large", f"a body may have at most {MAX_BYTES:,} bytes; {came}. Send less")


def parse(body: bytes) -> Any:
    """The JSON value. ApiError 400 unless it is one, of at most MAX_DEPTH levels."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise _invalid(f"may hold at most {MAX_VALUES:,} values; this one holds more")
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_number)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # broken JSON or UTF-8, or an integer of thousands of digits
        reason = getattr(error, "msg", "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error))
        raise _invalid(f"must be JSON in UTF-8: {reason}{_place(error)}") from None
    _check_depth(value)
    if _SURROGATE.search(body):
        _check_text(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {json.dumps(twice[:80])} stands in one object twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _no_number(text)
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:80]} is no number that JSON can hold")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    raise _too_deep()


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _invalid("must hold whole characters; one has half of a surrogate pair", "text_invalid") from None


def _too_deep() -> ApiError:
    return _invalid(f"may be nested {MAX_DEPTH} levels deep; this one goes deeper")


def _place(error: ValueError) -> str:
    return f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""


def _invalid(rule: str, code: str = "json_invalid") -> ApiError:
    return ApiError(400, code, f"the body {rule}")
